"""Weights in and out: file formats, names, accounting, preprocessing, and what is refused."""

import json
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import rule
import tiny_run
import torch_files
from paths import ROOT
from safetensors.numpy import save_file
from torch_files import Call, Global
from weight_arrays import NAME

from afa.config import BackboneConfig
from afa.errors import UserError
from afa.models import backbones, pretrained
from afa.models.backbones.contract import HALF, IMAGENET, Options
from afa.models.pretrained import files, match, names, zoo
from afa.runs import run as job
from experiments import run as experiment
from experiments import weights as command

REAL = ROOT.parent / "shared" / "weights"


def config(weights, **changes):
    return BackboneConfig(NAME, weights=str(weights), head="imagenet", **changes)


def read(chosen):
    found = pretrained.read(chosen)
    assert found is not None
    return found


def loaded(weights, shapes, **changes):
    chosen = config(weights, **changes)
    return pretrained.load_weights(shapes, read(chosen), chosen)


def refusal(weights, shapes, **changes) -> str:
    with pytest.raises(UserError) as caught:
        loaded(weights, shapes, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(weights), "FILE")


def assert_holds(variables, arrays):
    found = match.export(variables)
    assert found.keys() == arrays.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, arrays[name])


# ---- formats -------------------------------------------------------------------------------------


def save_npz(path, arrays):
    np.savez(path, **arrays)
    return path


def save_safetensors(path, arrays):
    save_file(arrays, path)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.pth", torch_files.write_zip),
        ("w.pt", torch_files.write_legacy),
        ("w.bin", torch_files.write_zip),
        ("w.npz", save_npz),
        ("w.safetensors", save_safetensors),
    ],
)
def test_every_format_is_read_exactly(tmp_path, shapes, arrays, name, write):
    variables, report = loaded(write(tmp_path / name, arrays), shapes)
    assert_holds(variables, arrays)
    assert set(report.loaded) == set(arrays)


def test_sharded_safetensors(tmp_path, shapes, arrays):
    keys = sorted(arrays)
    parts = {"model-1.safetensors": keys[:20], "model-2.safetensors": keys[20:]}
    for file, inside in parts.items():
        save_file({key: arrays[key] for key in inside}, tmp_path / file)
    where = {key: file for file, inside in parts.items() for key in inside}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    variables, _ = loaded(tmp_path, shapes)
    assert_holds(variables, arrays)
    (tmp_path / "model-2.safetensors").unlink()
    assert refusal(tmp_path, shapes) == (
        "backbone.weights='FILE': model.safetensors.index.json lists model-2.safetensors, "
        "which is missing"
    )
    index.write_text("{}")
    assert "is not an index" in refusal(tmp_path, shapes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_becomes_float32(tmp_path, shapes, arrays, dtype, suffix):
    half = {name: value.astype(dtype) for name, value in arrays.items()}
    write = save_safetensors if suffix == ".safetensors" else torch_files.write_zip
    variables, _ = loaded(write(tmp_path / f"w{suffix}", half), shapes)
    assert_holds(variables, {name: value.astype(np.float32) for name, value in half.items()})


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "backbone."])
def test_wrapper_prefixes_are_removed(tmp_path, shapes, arrays, prefix):
    wrapped = {prefix + name: value for name, value in arrays.items()}
    variables, _ = loaded(torch_files.write_zip(tmp_path / "w.pth", wrapped), shapes)
    assert_holds(variables, arrays)


def test_state_dict_in_a_training_checkpoint(tmp_path, shapes, arrays):
    tree = {"epoch": 7, "state_dict": arrays, "note": "best"}
    variables, _ = loaded(torch_files.write_zip(tmp_path / "w.pth", tree), shapes)
    assert_holds(variables, arrays)


def test_files_written_by_torch(tmp_path, shapes, arrays):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    for i, new in enumerate((True, False)):
        path = tmp_path / f"{i}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=new)
        assert_holds(loaded(path, shapes)[0], arrays)


# ---- hostile and damaged files -------------------------------------------------------------------


@pytest.mark.parametrize("write", [torch_files.write_zip, torch_files.write_legacy])
@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("posix", "system"), ("subprocess", "Popen"),
     ("torch.hub", "load"), ("builtins", "getattr"), ("numpy", "load")],
)  # fmt: skip
def test_malicious_pickle_runs_no_code(tmp_path, shapes, write, module, name):
    mark = tmp_path / "mark"
    tree = {"features.0.weight": Call(Global(module, name), f"touch {mark}")}
    message = refusal(write(tmp_path / "w.pth", tree), shapes)
    assert message == (
        f"backbone.weights='FILE': it calls {module}.{name}, and only tensors are read from a "
        "pickle: load it with the code that wrote it, and save its state_dict() alone"
    )
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    ("name", "write"),
    [("w.pth", torch_files.write_zip), ("w.pt", torch_files.write_legacy),
     ("w.npz", save_npz), ("w.safetensors", save_safetensors)],
)  # fmt: skip
def test_truncated_file_is_an_error(tmp_path, shapes, arrays, name, write, share):
    path = write(tmp_path / name, arrays)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    message = refusal(path, shapes)
    assert "damaged" in message or "truncated" in message or "not a PyTorch file" in message


def test_tensor_that_exceeds_its_storage_is_an_error(tmp_path, shapes):
    storage = torch_files.Storage("0", np.zeros(4, np.float32))
    for offset, shape, strides in ((2, (4,), (1,)), (0, (2, 2), (4, 1)), (0, (2**40,), (0,))):
        rebuild = Global("torch._utils", "_rebuild_tensor_v2")
        hooks = Call(Global("collections", "OrderedDict"))
        call = Call(rebuild, storage, offset, shape, strides, False, hooks)
        path = tmp_path / "w.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", torch_files.pickled({"a": call}))
            archive.writestr("archive/data/0", storage.values.tobytes())
        assert refusal(path, shapes).endswith("a tensor exceeds its storage")


def test_npz_of_objects_is_an_error(tmp_path, shapes):
    np.savez(tmp_path / "w.npz", a=np.array([{"hostile": True}], dtype=object))
    assert "not an npz file of arrays" in refusal(tmp_path / "w.npz", shapes)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("w.ckpt", b"x", "it is damaged or of an unknown format (allowed: PyTorch, "
                         "safetensors, npz)"),
        ("w.pth", b"", "it is empty"),
        ("w.pth", b"<html>", "it is a web page"),
        ("w.pth", b"version https://git-lfs", "it is a Git LFS pointer, not the file itself"),
        ("w.gz", b"\x1f\x8b\x08", "it is compressed by gzip: unpack it first"),
        ("w.pth", b"\x80\x02", "it is damaged or not a PyTorch file (EOFError)"),
        ("w.json", b"{}", "w.json is not an index"),
    ],
)  # fmt: skip
def test_other_files_are_an_error(tmp_path, shapes, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name, shapes) == f"backbone.weights='FILE': {expected}"


def test_missing_file_is_an_error(tmp_path, shapes):
    assert refusal(tmp_path / "w.pth", shapes) == (
        f"backbone.weights='FILE' does not exist: get the weights of {NAME}, published as "
        f"{backbones.member(NAME).source}, and pass them as --backbone.weights=FILE, or "
        "train from scratch with --backbone.weights=random"
    )
    assert refusal("~nobody-of-that-name/w.pth", shapes) == (
        "backbone.weights='FILE': ~ cannot be expanded (no HOME, or no such user)"
    )
    (tmp_path / "empty").mkdir()
    assert "is a directory without one of" in refusal(tmp_path / "empty", shapes)


def test_non_finite_values_are_an_error(tmp_path, shapes, arrays):
    damaged = dict(arrays)
    damaged["features.0.bias"] = np.full_like(arrays["features.0.bias"], np.nan)
    message = refusal(save_npz(tmp_path / "w.npz", damaged), shapes)
    assert message == f"backbone.weights='FILE' as {NAME}: features.0.bias is not finite"


# ---- missing and unexpected keys -----------------------------------------------------------------


def test_weights_of_another_architecture_are_an_error_listing_the_keys(tmp_path, shapes, arrays):
    other = dict(arrays)
    del other["features.3.squeeze.weight"]
    other["features.99.weight"] = np.zeros(3, np.float32)
    other["classifier.1.bias"] = np.zeros(7, np.float32)
    path = save_npz(tmp_path / "w.npz", other)
    message = refusal(path, shapes)
    assert message == (
        f"backbone.weights='FILE' as {NAME} does not fit: 1 missing: features.3.squeeze.weight; "
        "1 unexpected: features.99.weight; 1 mismatched: classifier.1.bias: (7,) -> (1000,) "
        "(backbone.allow_partial sets which keys need not fit)"
    )
    allowed = (r"features\.(3\.squeeze|99)\.weight", r"classifier\..*")
    variables, report = loaded(path, {**shapes}, allow_partial=allowed)
    assert report.missing == ("features.3.squeeze.weight",)
    assert report.unexpected == ("features.99.weight",)
    assert len(report.mismatched) == 1
    kept = variables["params"]["features.3"]["squeeze"]["kernel"]
    assert isinstance(kept, jax.ShapeDtypeStruct)  # left as it was
    assert "is not a regular expression" in refusal(path, shapes, allow_partial=("(",))
    assert "no key fits" in refusal(path, zoo.skeleton("resnet18")[1], allow_partial=(".*",))


def test_published_classifier_need_not_be_loaded(tmp_path, arrays):
    module = backbones.build(NAME, Options())
    shapes = jax.eval_shape(
        lambda: module.init(
            jax.random.key(0), jnp.zeros((1, 64, 64, 3)),
            method=lambda m, x: m.upper(m.lower(x, False, "clean"), False, "clean"),
        )
    )  # fmt: skip
    path = save_npz(tmp_path / "w.npz", arrays)
    chosen = BackboneConfig(NAME, weights=str(path))
    _, report = pretrained.load_weights(shapes, read(chosen), chosen)
    assert set(report.ignored) == {"classifier.1.weight", "classifier.1.bias"}


def test_statistics_are_loaded_into_both_branches():
    _, shapes = zoo.skeleton("resnet18")
    arrays = rule.filled({"bn1.running_mean": (64,), "bn1.running_var": (64,)})
    variables, _ = match.load_weights(shapes, arrays, "")
    found = variables["batch_stats"]["bn1"]
    for name in ("mean", "var"):
        np.testing.assert_array_equal(found[f"clean_{name}"], arrays[f"bn1.running_{name}"])
        np.testing.assert_array_equal(found[f"adversarial_{name}"], found[f"clean_{name}"])


def test_batch_counters_are_ignored():
    arrays = {"bn1.num_batches_tracked": np.zeros((), np.int64)}
    _, report = match.load_weights(zoo.skeleton("resnet18")[1], arrays, "")
    assert not report.unexpected


# ---- names of other libraries: the forward pass is compared in test_parity -----------------------


@pytest.mark.parametrize(
    ("family", "theirs", "ours"),
    [
        ("densenet", "features.denseblock1.denselayer2.norm.1.weight",
         "features.denseblock1.denselayer2.norm1.weight"),
        ("vgg", "pre_logits.fc1.weight", "classifier.0.weight"),
        ("resnet", "resnet.embedder.embedder.convolution.weight", "conv1.weight"),
        ("vit", "register_tokens", "reg_token"),
        ("vit", "conv_proj.weight", "patch_embed.proj.weight"),
    ],
)  # fmt: skip
def test_names_are_translated(family, theirs, ours):
    found, _ = names.translated({theirs: np.zeros(3, np.float32)}, family)
    assert list(found) == [ours]


# ---- preprocessing -------------------------------------------------------------------------------


def test_preprocessing_of_the_backbone_and_of_configuration_files(tmp_path, arrays):
    path = save_safetensors(tmp_path / "model.safetensors", arrays)
    assert read(config(path)).preprocessing == IMAGENET
    about = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.95}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    found = read(config(tmp_path)).preprocessing
    assert (found.mean, found.std, found.crop) == ((0.5,) * 3, (0.25,) * 3, 0.95)
    (tmp_path / "config.json").unlink()
    about = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    assert read(config(tmp_path)).preprocessing.mean == (0.1, 0.2, 0.3)
    assert backbones.member("googlenet").preprocessing == HALF
    assert backbones.member("bn_inception").preprocessing.channels == "bgr"


# ---- hub -----------------------------------------------------------------------------------------


def test_hub_offline_and_cached(tmp_path, shapes, arrays, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    save_safetensors(tmp_path / "model.safetensors", arrays)

    def gone(*args, **kwargs):
        raise hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", gone)
    message = refusal("hf://some/where", shapes)
    assert message.startswith(
        "backbone.weights='FILE' is not in the cache of huggingface_hub and cannot be downloaded "
        f"(LocalEntryNotFoundError): get the weights of {NAME}, "
    )
    assert message.endswith("train from scratch with --backbone.weights=random")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert_holds(loaded("hf://some/where@main", shapes)[0], arrays)


# ---- the command ---------------------------------------------------------------------------------


def test_check_identifies_the_backbone_and_reports_missing_keys(tmp_path, arrays, capsys):
    path = save_npz(tmp_path / "w.npz", arrays)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (2, 64, 64, 3), np.uint8)
    found = zoo.identify(str(path), ["squeezenet1_0", NAME])
    assert found.name == NAME
    np.savez(tmp_path / "l.npz", images=images, logits=zoo.classify(found, images), labels=[1, 2])
    words = ["--check", str(path), "--backbone", NAME, "--logits", str(tmp_path / "l.npz")]
    assert command.main(words) == 0
    message = capsys.readouterr().out
    assert f"backbone   {NAME}, torchvision names\n" in message and message.endswith("fits\n")
    short = {name: value for name, value in arrays.items() if name != "features.0.bias"}
    assert command.main(["--check", str(save_npz(path, short)), "--backbone", NAME]) == 2
    assert "missing    1: features.0.bias" in capsys.readouterr().out


def test_invalid_command_lines_are_errors(capsys):
    for words in (["--export", "x"], ["--list", "--backbone", "y"], [], ["--check", "nowhere.pth"]):
        assert command.main(words) == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason="the published weights are not beside the project")
def test_published_weights_reproduce_published_logits():
    found = zoo.identify(
        str(REAL / "squeezenet1_0_imagenet_torchvision_layout.pth"), ["squeezenet1_0"]
    )
    assert not (found.report.missing or found.report.unexpected or found.report.mismatched)
    with np.load(REAL / "imagenet20_squeezenet1_0_reference_logits.npz") as stored:
        images, wanted = stored["images_uint8_nhwc"], stored["logits"]
    ours = zoo.classify(found, images)
    assert np.abs(ours - wanted).max() < 1e-3 * np.abs(wanted).max()
    np.testing.assert_array_equal(ours.argmax(-1), wanted.argmax(-1))


# ---- out again -----------------------------------------------------------------------------------


def test_run_exports_and_reloads(tiny_finished, tmp_path, capsys):
    """A run -> safetensors under published names -> the same network, bit for bit."""
    own = files.read(str(tiny_finished))
    path = tmp_path / "out.safetensors"
    assert command.main(["--export", str(tiny_finished), "--to", str(path)]) == 0
    back = files.read(str(path))
    assert back.arrays.keys() == own.arrays.keys() and "layer1.0.conv1.weight" in own.arrays
    for name, value in own.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], value)
    capsys.readouterr()
    assert command.main(["--check", str(path), "--backbone", "tiny"]) == 0
    assert capsys.readouterr().out.endswith("fits, without the published classifier\n")


def test_run_starts_from_the_weights_of_another(tiny_finished, tiny_data, tmp_path, capsys):
    """Through the command line: stored with run and index, searched with, and held to."""
    changes = {"backbone.weights": str(tiny_finished), "backbone.mean": (0.1, 0.2, 0.3)}
    line = tiny_run.words(tiny_data, tmp_path / "run", **changes)
    assert tiny_run.main(*line) == 0
    assert f"weights   {tiny_finished} (torchvision names" in capsys.readouterr().out
    record = tiny_run.result(tmp_path / "run")["backbone_weights"]
    assert record["source"] == str(tiny_finished) and len(record["sha256"]) == 64
    manifest = json.loads((tmp_path / "run" / "embeddings" / "index.json").read_text())
    assert manifest["backbone_weights"] == record
    assert manifest["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert manifest["preprocessing"]["std"] == list(IMAGENET.std)
    (tmp_path / "run" / "weights.json").write_text(json.dumps(record | {"sha256": "0" * 64}))
    assert tiny_run.main(*line) == 2
    assert "started from other weights: sha256 000000000000 -> " in capsys.readouterr().err


def test_weights_that_do_not_fit_leave_no_files(tiny_data, tmp_path, arrays, capsys):
    path = save_npz(tmp_path / "w.npz", arrays)
    changes = {"backbone.weights": str(path)}
    line = tiny_run.words(tiny_data, tmp_path / "run", **changes)
    assert tiny_run.main(*line) == 2
    assert "as tiny does not fit: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_published_classifier_gives_a_descriptor_block(tiny_finished, tiny_data, tmp_path):
    """`backbone.head=imagenet`: its parameters are frozen, and its posterior is a variant."""
    changes = {"backbone.head": "imagenet", "train.steps": "2", "train.plain": "1",
               "train.generator_steps": "1", "optim.weight_decay": "0.1"}  # fmt: skip
    home = tmp_path / "run"
    assert tiny_run.main(*tiny_run.words(tiny_data, home, **changes)) == 0
    rows = tiny_run.result(home)["metrics"]["test"]
    assert rows["published classes alone"]["fusion"]["weights"] == {"imagenet": 1.0}
    assert "published classes alone" not in tiny_run.result(tiny_finished)["metrics"]["test"]
    trained = files.read(str(home)).arrays["fc.weight"]
    assert trained.shape[0] == 1000

    def first(**changes):
        chosen = experiment.parse(tiny_run.words(tiny_data, home, **changes))
        backbone = job.build_setup(chosen).fresh_state().variables["embedder"]["params"]["backbone"]
        return np.asarray(backbone["fc"]["kernel"]).T

    average = pytest.approx(trained, rel=1e-5)  # the moving average of constant values
    assert first(**changes) == average  # neither learned nor decayed
    again = {"backbone.weights": str(home), "backbone.head": "imagenet"}
    np.testing.assert_array_equal(first(**again), trained)
