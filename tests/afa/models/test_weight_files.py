"""Files of weights as training programs leave them: parts, formats, other objects, bad values."""

import argparse
import collections
import contextlib
import datetime
import json
import os
import pathlib
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch_files
from safetensors.numpy import save_file
from torch_files import Call, Global, Raw
from weight_arrays import NAME

from afa import unpickle
from afa.config import BackboneConfig
from afa.errors import UserError
from afa.models import pretrained
from afa.models.pretrained import match, zoo
from experiments import weights as command

HEAD = "classifier.1."


def below(prefix, arrays, factor=1):
    return {prefix + name: factor * value for name, value in arrays.items()}


def loaded(path, shapes, **changes):
    config = BackboneConfig(NAME, weights=str(path), head="imagenet", **changes)
    read = pretrained.read(config)
    assert read is not None
    return read, pretrained.load_weights(shapes, read, config)[0]


def refusal(path, shapes, **changes):
    with pytest.raises(UserError) as caught:
        loaded(path, shapes, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def check(path, capsys, *words):
    code = command.main(["--check", str(path), "--backbone", NAME, *words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out + said.err


def assert_holds(variables, arrays, factor=1):
    found = match.export(variables)
    assert found.keys() == arrays.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, factor * arrays[name])


# ---- parts ---------------------------------------------------------------------------------------

QUEUE = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [("model.", "criterion.proxies"), ("encoder_q.", "queue"), ("backbone.", "neck.weight"),
     ("module.encoder_q.", "module.queue"), ("model.visual.trunk.", "model.logit_scale"),
     ("_orig_mod.module.", "step")],
)  # fmt: skip
def test_backbone_with_a_prefix_is_found(tmp_path, shapes, arrays, capsys, prefix, beside):
    tree = {"state_dict": {beside: QUEUE, **below(prefix, arrays)}, "epoch": 3}
    path = torch_files.write_zip(tmp_path / "w.pth", tree)
    read, variables = loaded(path, shapes)
    assert_holds(variables, arrays)
    assert read.record()["part"] == f"state_dict.{prefix}"
    code, output = check(path, capsys)
    assert code == 0 and output.endswith("fits\n")
    assert f"note       part state_dict.{prefix[:-1]} of the file\n" in output
    assert f"outside    1: state_dict.{beside}\n" in output


@pytest.mark.parametrize(
    "keys",
    [["state_dict_ema"], ["model_ema"], ["params"], ["network"], ["checkpoint", "model"],
     ["state", "models", "0"]],
)  # fmt: skip
@pytest.mark.parametrize("write", [torch_files.write_zip, torch_files.write_legacy])
def test_backbone_in_nested_dictionaries_is_found(tmp_path, shapes, arrays, write, keys):
    tree = arrays
    for key in reversed(keys):
        tree = {key: tree}
    read, variables = loaded(write(tmp_path / "w.pth", tree), shapes)
    assert_holds(variables, arrays)
    assert read.part == ".".join(keys) + "."


def test_optimiser_moments_are_not_loaded(tmp_path, shapes, arrays):
    moments = {i: {"exp_avg": value} for i, value in enumerate(arrays.values())}
    tree = {"optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]}, "model": arrays}
    read, variables = loaded(torch_files.write_zip(tmp_path / "w.pth", tree), shapes)
    assert_holds(variables, arrays)
    assert len(read.outside) == len(arrays)


def test_backbone_part_chooses_between_two_parts(tmp_path, shapes, arrays, capsys):
    tree = {"state_dict": arrays, "state_dict_ema": below("module.", arrays, 2)}
    path = torch_files.write_zip(tmp_path / "w.pth", tree)
    read, variables = loaded(path, shapes)
    assert_holds(variables, arrays)
    assert read.notes == (
        "part state_dict of the file; state_dict_ema.module fit too (set backbone.part to choose)",
    )
    read, variables = loaded(path, shapes, part="state_dict_ema")
    assert_holds(variables, arrays, 2)
    assert read.part == "state_dict_ema.module."
    code, output = check(path, capsys, "--part", "state_dict_ema.module")
    assert code == 0 and "part state_dict_ema.module of the file" in output
    assert refusal(path, shapes, part="state_dict_emma") == (
        "backbone.part='state_dict_emma' is not a part of the file; did you mean 'state_dict_ema'? "
        "(parts: state_dict, state_dict_ema, state_dict_ema.module, state_dict.features, "
        "state_dict.classifier)"
    )


@pytest.mark.parametrize(("second", "first"), [("student", "teacher"), ("encoder_k", "encoder_q")])
def test_published_network_of_a_pair_is_loaded(tmp_path, shapes, arrays, second, first):
    tree = {second: below("backbone.", arrays, 2), first: below("backbone.", arrays)}
    read, variables = loaded(torch_files.write_zip(tmp_path / "w.pth", tree), shapes)
    assert_holds(variables, arrays)
    assert read.part == f"{first}.backbone."


def test_file_without_a_backbone_is_an_error_listing_its_parts(tmp_path, capsys):
    tree = {"decoder": {f"conv{i}.kernel": QUEUE for i in range(3)}, "scale": QUEUE}
    path = torch_files.write_zip(tmp_path / "w.pth", tree)
    assert check(path, capsys) == (
        2, f"error: {path}: has no parameter of any backbone; parts with several tensors: "
           "decoder\n",
    )  # fmt: skip


def test_check_and_run_agree_on_another_classifier(tmp_path, arrays, capsys):
    """Weights fine-tuned to ten classes fit except for the classifier, which runs do not need."""
    other = {name: value[:10] if name.startswith(HEAD) else value for name, value in arrays.items()}
    path = torch_files.write_zip(tmp_path / "w.pth", other)
    code, output = check(path, capsys)
    assert code == 0 and "mismatched 2: " in output
    assert output.endswith("fits, without the published classifier\n")


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["w.pth.tar", "w.ckpt", "w", "model_best", "w.safetensors", "w.npz"]
)
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "npz", "safetensors"])
def test_format_is_detected_from_the_content(tmp_path, shapes, arrays, kind, name):
    path = tmp_path / name
    if kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **arrays)
    elif kind == "safetensors":
        save_file(arrays, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"model": arrays}))
    else:
        {"zip": torch_files.write_zip, "legacy": torch_files.write_legacy}[kind](path, arrays)
    assert_holds(loaded(path, shapes)[1], arrays)


def test_index_file_can_be_given(tmp_path, shapes, arrays):
    save_file(arrays, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, "one.safetensors")}))
    assert_holds(loaded(index, shapes)[1], arrays)


# ---- other objects in a pickle -------------------------------------------------------------------

SETTINGS = argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("/runs"), names={"a", "b"})
COUNTS = collections.defaultdict(list, a=[1, 2])


@pytest.mark.parametrize("write", [torch_files.write_zip, torch_files.write_legacy])
@pytest.mark.parametrize(
    "harmless",
    [SETTINGS, np.float64(71.3), np.arange(3), COUNTS, datetime.datetime(2026, 1, 2), {1, 2},
     collections.Counter("aab"), [SETTINGS, {"deep": SETTINGS}]],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_harmless_objects_are_skipped(tmp_path, shapes, arrays, write, harmless):
    tree = {"args": Raw(harmless), "state_dict": arrays}
    assert_holds(loaded(write(tmp_path / "w.pth", tree), shapes)[1], arrays)


def test_training_checkpoint_written_by_torch(tmp_path, shapes, arrays):
    torch = pytest.importorskip("torch")
    state = collections.OrderedDict((k, torch.from_numpy(v)) for k, v in arrays.items())
    state._metadata = {"": {"version": 1}}  # pyright: ignore - as the state of a module has
    tree = {"args": SETTINGS, "best": np.float64(1), "model": state, "device": torch.device("cpu"),
            "dtype": torch.float16, "size": torch.Size([1, 2])}  # fmt: skip
    for i, new in enumerate((True, False)):
        torch.save(tree, tmp_path / f"{i}.tar", _use_new_zipfile_serialization=new)
        assert_holds(loaded(tmp_path / f"{i}.tar", shapes)[1], arrays)


def test_other_objects_are_an_error_with_advice(tmp_path, shapes, arrays):
    tree = {"meter": Call(Global("utils.meters", "AverageMeter")), "state_dict": arrays}
    assert refusal(torch_files.write_zip(tmp_path / "w.pth", tree), shapes) == (
        "backbone.weights='FILE': it calls utils.meters.AverageMeter, and only tensors are read "
        "from a pickle: load it with the code that wrote it, and save its state_dict() alone"
    )


def test_skipped_class_runs_no_code_and_is_not_changed(tmp_path, shapes):
    """A placeholder handles every opcode that could modify a class."""
    for body in (
        b"(N}S'__setstate__'\nNstb.",  # BUILD with slots on the class itself
        b"(S'a'\nI1\nu.",  # SETITEMS on the class
        b"(I1\ne.",  # APPENDS on the class
    ):
        path = tmp_path / "w.pth"
        path.write_bytes(b"\x80\x02cargparse\nNamespace\n" + body)
        assert "backbone.weights='FILE': " in refusal(path, shapes)
    assert unpickle.Skipped(1, a=2).__setstate__({"x": 1}) is None
    assert not hasattr(unpickle.Skipped(), "x")


def test_a_storage_type_cannot_be_changed(tmp_path, shapes):
    """A file cannot modify the float32 dtype of this process."""
    path = tmp_path / "w.pth"
    path.write_bytes(b"\x80\x02ctorch\nFloatStorage\n(I3\nS'>'\nNNNI-1\nI-1\nI0\ntb.")
    assert refusal(path, shapes) == "backbone.weights='FILE': it changes a function"
    assert np.dtype(np.float32).byteorder == "="


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x * np.float32(np.nan), "is not finite"),
        (lambda x: np.where(x == x.max(), np.inf, x), "is not finite"),
        (lambda x: x.astype(np.float64) * 1e300, "is not finite"),
        (lambda x: x.astype(np.int8), "has type int8, not a floating-point type"),
        (lambda x: x.astype(np.complex64), "has type complex64, not a floating-point type"),
    ],
)
def test_invalid_values_are_an_error_in_check_and_run(
    tmp_path, shapes, arrays, capsys, change, reason
):
    damaged = arrays | {"features.0.bias": change(arrays["features.0.bias"])}
    path = tmp_path / "w.npz"
    np.savez(path, **damaged)
    expected = f"features.0.bias {reason}"
    assert refusal(path, shapes) == f"backbone.weights='FILE' as {NAME}: {expected}"
    code, output = check(path, capsys)
    assert code == 2 and output.endswith("does not fit\n")
    assert f"invalid    1: features.0.bias: {reason}\n" in output


def test_negative_variance_is_invalid():
    _, shapes = zoo.skeleton("resnet18")
    _, report = match.load_weights(shapes, {"bn1.running_var": np.full(64, -1, np.float32)}, "")
    assert report.invalid == ("bn1.running_var: is below 0",)


# ---- configuration files -------------------------------------------------------------------------

NOT_A_LIST = "of its configuration is not a list of three numbers, one per channel"


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"mean": "abc"}, f"mean='abc' {NOT_A_LIST}"),
        ({"image_std": ["a", 1, 1]},
         f"image_std=['a', 1, 1] {NOT_A_LIST}"),
        ({"mean": [0.5, 0.5]}, f"mean=[0.5, 0.5] {NOT_A_LIST}"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "std [0.0, 1.0, 1.0] must be above 0"),
        ({"mean": [float("nan")] * 3},
         f"mean=[nan, nan, nan] {NOT_A_LIST}"),
    ],
)  # fmt: skip
def test_invalid_preprocessing_is_an_error(tmp_path, shapes, arrays, about, expected):
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert refusal(tmp_path, shapes) == f"backbone.weights='FILE': {expected}"


def test_damaged_preprocessing_is_an_error(tmp_path, shapes, arrays):
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text("{")
    assert "preprocessor_config.json next to it is not valid JSON (" in refusal(tmp_path, shapes)


@pytest.mark.parametrize(
    ("about", "mean", "std"),
    [
        ({"mean": [127.5, 127.5, 127.5], "std": [127.5, 127.5, 127.5]}, [0.5] * 3, [0.5] * 3),
        ({"image_mean": [102, 51, 0], "image_std": [1, 1, 1]}, [0.4, 0.2, 0], [1 / 255] * 3),
        ({"image_mean": [0, 0, 0], "image_std": [255, 255, 255]}, [0] * 3, [1] * 3),
        ({"mean": [0, 0, 0], "std": [1, 1, 1]}, [0] * 3, [1] * 3),
        ({"mean": 0.5, "std": 0.5}, [0.5] * 3, [0.5] * 3),
    ],
)  # fmt: skip
def test_preprocessing_for_0_to_255_is_rescaled_and_reported(
    tmp_path, shapes, arrays, capsys, about, mean, std
):
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(about))
    read, _ = loaded(tmp_path, shapes)
    assert read.preprocessing.mean == pytest.approx(mean)
    assert read.preprocessing.std == pytest.approx(std)
    scaled = max(np.ravel([*about.values()])) > 1
    assert any("divided by 255" in line for line in read.notes) == scaled
    assert ("divided by 255" in check(tmp_path, capsys)[1]) == scaled


# ---- permission ----------------------------------------------------------------------------------


@pytest.fixture
def locked():
    """A folder that other users can list, for files that they cannot read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for each in [folder, *folder.iterdir()]:
        each.chmod(0o700)
    shutil.rmtree(folder)


@contextlib.contextmanager
def no_administrator():
    """Permissions do not hold for root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("kind", ["w.pth", "w.safetensors", "w.npz", "config.json", "folder"])
def test_unreadable_file_is_an_error(locked, shapes, arrays, kind):
    save_file(arrays, locked / "w.safetensors")
    path = locked / "w.safetensors"
    if kind == "folder":
        path, closed = locked, locked
    elif kind == "config.json":
        path, closed = path.rename(locked / "model.safetensors").parent, locked / kind
        closed.write_text("{}")
        (locked / "model.safetensors").chmod(0o644)
    else:
        path = closed = path.rename(locked / kind)
    closed.chmod(0)
    with no_administrator():
        output = refusal(path, shapes)
    name = "FILE/config.json " if kind == "config.json" else ""
    assert output == f"backbone.weights='FILE': {name}cannot be read (Permission denied)"


def test_file_in_an_unreadable_folder_is_an_error(locked, shapes):
    locked.chmod(0)
    with no_administrator():
        output = refusal(locked / "w.pth", shapes)
    assert output == "backbone.weights='FILE': cannot be read (Permission denied)"
