"""The directory of a run: lock, stored configuration, full disk."""

import errno
import multiprocessing
import os
import signal
from typing import get_args, get_type_hints

import pytest

from afa.config import LOSS_NAME, RESUMABLE, ExperimentConfig, flatten, with_changes
from afa.errors import UserError
from afa.workdir import Workdir


def keep_locked(root, ready):
    """Locks the directory in another process until it is killed."""
    with Workdir(root).locked():
        ready.set()
        signal.pause()


def test_lock_is_exclusive_and_released_when_the_process_dies(tmp_path):
    home = Workdir(tmp_path / "deep" / "run")
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=keep_locked, args=(home.root, ready))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match="another run is using it"), home.locked():
            raise AssertionError("the lock was given twice")
    finally:
        other.kill()
        other.join()
    with home.locked():
        assert home.root.is_dir()
    with home.locked():  # again, after it was released
        pass


def test_directory_accepts_only_its_own_run(tmp_path):
    home, config = Workdir(tmp_path), ExperimentConfig()
    assert home.stored() is None
    home.claim("one", config)
    assert home.stored() == ("one", config)
    written = home.config.read_bytes()
    home.claim("one", config)
    with pytest.raises(UserError) as error:
        home.claim("one", with_changes(config, **{"seed": 3, "data.flip": False}))
    assert str(error.value) == (
        f"--workdir={tmp_path} contains a run with another configuration: seed: 0 -> 3; "
        "data.flip: True -> False (choose another --workdir, or the stored values)"
    )
    assert home.config.read_bytes() == written


def another(config, name, value):
    """Returns a valid value of a field, different from `value`."""
    head, _, last = name.rpartition(".")
    choices = get_args(get_type_hints(type(getattr(config, head) if head else config))[last])
    if isinstance(value, tuple):
        return value[:1] if value else (choices[0](1),)
    if isinstance(value, bool):
        return not value
    if name == LOSS_NAME:
        return "triplet"
    if isinstance(value, str):
        return next((each for each in choices if each != value), value + "x")
    return value + 1


def test_only_resumable_fields_may_change(tmp_path):
    """All other fields affect what is computed."""
    home, config = Workdir(tmp_path), ExperimentConfig()
    home.claim("one", config)
    for name, value in flatten(config).items():
        changed = with_changes(config, **{name: another(config, name, value)})
        if name.startswith(RESUMABLE):
            home.claim("one", changed)
            continue
        with pytest.raises(UserError, match=rf"{name}: .+ -> .+"):
            home.claim("one", changed)
    fixed = ("data.image_size", "data.split_seed", "train.steps", "optim.", "adversarial.", "seed")
    assert not any(name.startswith(RESUMABLE) for name in fixed)


@pytest.mark.parametrize("content", ["{", "[]", '{"experiment": "a"}', '{"config": 3}'])
def test_a_damaged_configuration_is_an_error(content, tmp_path):
    home = Workdir(tmp_path)
    home.config.write_text(content)
    with pytest.raises(UserError, match=r"config\.json: is not a stored configuration \("):
        home.stored()


def test_images_are_compared_by_fingerprint(tmp_path):
    home = Workdir(tmp_path)
    home.confirm("a" * 64)  # a new run
    home.split.write_text('{"fingerprint": "%s"}' % ("a" * 64))
    home.confirm("a" * 64)
    with pytest.raises(UserError) as error:
        home.confirm("b" * 64)
    assert str(error.value) == (
        f"--workdir={tmp_path} contains a run on other images: fingerprint aaaaaaaaaaaa -> "
        "bbbbbbbbbbbb (choose another --workdir, or restore the data set)"
    )
    home.split.write_text("{}")
    with pytest.raises(UserError, match=r"split\.json: is not a stored split \('fingerprint'\)"):
        home.confirm("a" * 64)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_line(number, tmp_path):
    with pytest.raises(UserError) as error, Workdir(tmp_path).locked():
        raise OSError(number, os.strerror(number))
    assert str(error.value) == (
        f"--workdir={tmp_path}: cannot be written ({os.strerror(number)}); fix this and run "
        "the same command again to continue"
    )


def test_other_errors_are_not_reported_as_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), Workdir(tmp_path).locked():
        raise FileNotFoundError(errno.ENOENT, "gone")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="is not writable"), Workdir(tmp_path).locked():
            pass
    finally:
        tmp_path.chmod(0o700)
