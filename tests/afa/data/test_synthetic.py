"""The synthetic data set: splits, cache, and interrupted or concurrent builds."""

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from afa.config import DataConfig
from afa.data.synthetic import dataset as embedded
from afa.data.synthetic.dataset import encode, load_synthetic, render_parallel, split_objects
from afa.data.synthetic.objects import FAMILY
from afa.data.synthetic.render import render
from afa.errors import UserError

OBJECTS, VIEWS, SIZE = 12, 2, 16


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return DataConfig(cache=str(cache), objects=OBJECTS, views=VIEWS, render_size=SIZE)


@pytest.fixture(scope="module")
def dataset(config):
    return load_synthetic(config)


def test_every_image_occurs_once(dataset):
    sets = dataset.splits.values()
    assert sum(len(s) for s in sets) == OBJECTS * (VIEWS + 1)
    assert len({name for s in sets for name in s.ids}) == OBJECTS * (VIEWS + 1)
    assert dataset.class_names[11] == "object_0011"
    assert dataset.train.ids[:3] == (
        "object_0000/catalogue",
        "object_0000/wild_01",
        "object_0000/wild_02",
    )
    assert dataset.train.catalogue[:4].tolist() == [True, False, False, True]
    assert dataset.test.labels.tolist() == [8] * 3 + [9] * 3 + [10] * 3 + [11] * 3


def test_images_and_ids_match_the_renderer(dataset):
    for images in dataset.splits.values():
        for index in (0, 1, len(images) - 1):
            view = 0 if images.catalogue[index] else int(images.ids[index][-2:])
            expected = render(embedded.SEED, int(images.labels[index]), view, SIZE)
            assert images.images[index] == encode(expected)
            decoded = simplejpeg.decode_jpeg(images.images[index])
            assert np.abs(decoded.astype(int) - expected).mean() < 8
            assert f"object_{images.labels[index]:04d}/" in images.ids[index]


def test_images_can_be_read_from_several_threads(dataset):
    index = list(range(len(dataset.train))) * 4
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(dataset.train.images.__getitem__, index))
    assert read == [dataset.train.images[i] for i in index]


def test_slices_of_images(dataset):
    assert dataset.train.images[1:3] == [dataset.train.images[1], dataset.train.images[2]]


@pytest.mark.parametrize("objects", [12, 16, 40, 160])
def test_families_stay_in_one_split(objects):
    splits = split_objects(objects)
    assert [o for split in splits.values() for o in split] == list(range(objects))
    families = [{o // FAMILY for o in split} for split in splits.values()]
    assert all(families)
    assert not (families[0] & families[1] or families[0] & families[2] or families[1] & families[2])


def test_default_split_sizes():
    sizes = {name: len(objects) for name, objects in split_objects(160).items()}
    assert sizes == {"train": 100, "validation": 20, "test": 40}


def test_a_second_load_reads_the_cache(dataset, config, monkeypatch):
    monkeypatch.setattr(embedded, "_build", None)
    again = load_synthetic(config)
    assert again.fingerprint == dataset.fingerprint
    assert again.test.ids == dataset.test.ids
    hidden = [entry.name for entry in Path(config.cache).iterdir()]
    assert len(hidden) == 2  # the data set and the lock


def test_fingerprint_differs_between_data_sets(dataset, config, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "VERSION", 0)
    other = load_synthetic(dataclasses.replace(config, cache=str(tmp_path)))
    assert other.fingerprint != dataset.fingerprint


def test_interrupted_build_is_restarted(dataset, config, tmp_path):
    config = dataclasses.replace(config, cache=str(tmp_path))
    folder = embedded._folder(config)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    unfinished.mkdir()
    (unfinished / "half").write_text("a")
    assert load_synthetic(config).fingerprint == dataset.fingerprint
    assert not unfinished.exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("No space left on device")]
)
def test_failed_build_leaves_no_files(config, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(embedded, "render_parallel", full)
    config = dataclasses.replace(config, cache=str(tmp_path))
    message = (
        f"data.cache='{tmp_path}': the synthetic data set cannot be built there "
        "(No space left on device)"
    )
    with pytest.raises(UserError) as caught:
        load_synthetic(config)
    assert str(caught.value) == message
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]


def test_concurrent_builds_wait_for_the_lock(dataset, config, tmp_path):
    code = (
        "import sys; from afa.config import DataConfig; "
        "from afa.data.synthetic.dataset import load_synthetic; "
        f"c = DataConfig(cache=sys.argv[1], objects={OBJECTS}, views={VIEWS}, render_size={SIZE}); "
        "print(load_synthetic(c).fingerprint)"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=120)[0].decode().strip() for run in runs]
    assert outputs == [dataset.fingerprint] * 2


def test_unwritable_cache_is_an_error(config, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="is not a directory") as caught:
        load_synthetic(dataclasses.replace(config, cache=str(blocked)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "least"), [("objects", 8, 12), ("views", 1, 2), ("render_size", 8, 16)]
)
def test_settings_out_of_range_are_an_error(config, field, value, least):
    with pytest.raises(UserError) as caught:
        load_synthetic(dataclasses.replace(config, **{field: value}))
    assert str(caught.value) == f"data.{field}={value} is too small (allowed: at least {least})"


def test_partial_family_is_an_error(config):
    with pytest.raises(UserError) as caught:
        load_synthetic(dataclasses.replace(config, objects=15))
    assert str(caught.value) == (
        "data.objects=15 splits a family of look-alikes (allowed: multiples of 4; nearest: 16)"
    )


def test_failed_worker_is_an_error(monkeypatch, capfd):
    monkeypatch.setattr(embedded, "_WORKER", "raise SystemExit(7)")
    with pytest.raises(RuntimeError, match=r"ended early \(code 7\)"):
        list(render_parallel(range(2), 1, 16))


def test_images_do_not_depend_on_the_number_of_workers(monkeypatch):
    several = list(render_parallel(range(2, 4), 2, 16))
    monkeypatch.setattr(embedded, "MAX_WORKERS", 1)
    assert list(render_parallel(range(2, 4), 2, 16)) == several
    assert several[4] == encode(render(embedded.SEED, 3, 1, 16))


def test_folds_split_the_training_and_validation_families(config, dataset):
    runs = [load_synthetic(dataclasses.replace(config, folds=2, fold=i)) for i in range(2)]
    not_tested = set(range(8))  # the last of three families is for testing
    for data, other in zip(runs, runs[::-1], strict=True):
        validating = set(data.validation.classes.tolist())
        assert set(data.train.classes.tolist()) == not_tested - validating
        assert validating == set(other.train.classes.tolist())
        assert len({label // FAMILY for label in validating}) == 1
        assert data.test.ids == dataset.test.ids
        assert data.test_fingerprint == dataset.test_fingerprint == dataset.fingerprint
        index = 1 if data.train.labels[0] == 0 else 0
        image = render(embedded.SEED, int(data.train.labels[index]), index, SIZE)
        assert data.train.images[index] == encode(image)
        assert "fold" in data.protocol
    assert len({runs[0].fingerprint, runs[1].fingerprint, dataset.fingerprint}) == 3
    with pytest.raises(
        UserError, match="splits 2 families of look-alikes into folds of 0, and 1 is"
    ):
        load_synthetic(dataclasses.replace(config, folds=3))
