"""Locks, digests, and directories for files."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from afa import io
from afa.errors import UserError


def test_one_lock_at_a_time(tmp_path):
    path = tmp_path / ".lock"
    with io.locked(path, "busy"):
        with pytest.raises(UserError, match=r"^busy$"), io.locked(path, "busy"):
            pass
        code = "import sys; from afa import io\nwith io.locked(io.Path(sys.argv[1]), 'b'): pass"
        environment = os.environ | {"PYTHONPATH": str(Path(io.__file__).parent.parent)}
        words = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.stderr.endswith("UserError: b\n")
    with io.locked(path, "busy"), pytest.raises(ZeroDivisionError), io.locked(tmp_path / "other"):
        raise ZeroDivisionError
    with io.locked(path):
        pass


def test_digests(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 10**6)
    digest = hashlib.sha256(b"abc" * 10**6).hexdigest()
    assert io.file_sha256(path) == digest
    joint = hashlib.sha256((digest + "00").encode()).hexdigest()
    assert io.joint_sha256([digest, "00"]) == joint


def test_whether_a_directory_can_be_written(tmp_path):
    io.require_writable(tmp_path / "a" / "b", "--out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"^--out={path}: cannot be written ") as error:
            io.require_writable(path, "--out")
        assert str(error.value).endswith("is not a directory)")
    with pytest.raises(UserError, match=r"^--out=/proc/x: cannot be written "):
        io.require_writable(Path("/proc/x"), "--out")


@pytest.fixture
def homeless(monkeypatch):
    """As in a container with a uid without a name: Path.home raises a RuntimeError."""
    monkeypatch.delenv("HOME", raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    import pwd

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


def test_cache_home_without_a_home_is_a_temporary_directory(homeless, monkeypatch, tmp_path):
    monkeypatch.setattr(io.tempfile, "tempdir", str(tmp_path))
    assert io.cache_home() == tmp_path / f"afa-cache-{os.getuid()}"
    with pytest.raises(UserError, match=r"^data\.path='~/x': ~ cannot be expanded"):
        io.expanded("data.path", "~/x")
    assert io.expanded("data.path", "x/y") == Path("x/y")


def test_cache_home_is_in_the_home_if_it_is_writable(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert io.cache_home() == tmp_path / ".cache" / "afa"
    assert io.expanded("data.path", "~/x") == tmp_path / "x"
    monkeypatch.setattr(io.os, "access", lambda path, mode: False)  # as for HOME=/
    assert io.cache_home().name == f"afa-cache-{os.getuid()}"


def test_paths_with_a_tilde_are_refused_without_a_home(homeless, tmp_path):
    from afa.config import DataConfig
    from afa.data.sources import folder, listed
    from afa.data.synthetic import dataset
    from afa.models.pretrained import files

    assert "afa-cache" in str(dataset._folder(DataConfig()))
    for field, call in {
        "data.cache": lambda: dataset._folder(DataConfig(cache="~/c")),
        "data.path": lambda: folder.load_folder(DataConfig(name="folder", path="~/d")),
        "--path": lambda: listed.directory("--path", "~/e"),
        "backbone.weights": lambda: files.read("~/w.pth"),
    }.items():
        with pytest.raises(UserError, match=f"^{field}='~/.*': ~ cannot be expanded"):
            call()
