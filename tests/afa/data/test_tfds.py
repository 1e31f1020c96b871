"""TFDS data sets: mocks with the features of the real ones, written as array_record."""

import importlib.util
import re
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tfds_mocks import IMAGE, MOCKS, TEXT, write

from afa.config import DataConfig
from afa.data.images import decode
from afa.data.pipeline import TrainPipeline
from afa.data.sources.tfds import PROTOCOLS, load_tfds
from afa.errors import UserError


def load_mock(name, data_dir, **changes):
    features, classes = MOCKS[name]
    write(name, features, classes, data_dir)
    return load_tfds(DataConfig(name=f"tfds:{name}", path=str(data_dir), **changes))


EXPECTED = {  # classes of train + validation, classes of test, images of test
    "caltech_birds2011": (range(5), range(5, 10), 20),
    "cars196": (range(5), range(5, 9), 16),
    "stanford_online_products": (range(7), range(7, 12), 10),
    "omniglot": (range(5), range(5, 9), 8),
    "cifar100": (range(4), range(4, 8), 16),
    "oxford_flowers102": (range(4), range(4, 8), 24),
    "imagenet2012": (range(4), range(4, 8), 16),
    "cmaterdb": (range(4), range(4, 8), 16),
    "something_else": (range(4), range(4, 8), 8),
}


def test_every_protocol_has_a_mock():
    assert set(PROTOCOLS) == set(MOCKS) - {"something_else"} == set(EXPECTED) - {"something_else"}


@pytest.mark.parametrize("name", MOCKS)
def test_class_disjoint_split(name, tmp_path):
    data = load_mock(name, tmp_path)
    training, testing, count = EXPECTED[name]
    both = sorted({*data.train.classes.tolist(), *data.validation.classes.tolist()})
    assert both == list(training)
    assert data.test.classes.tolist() == list(testing)
    assert len(data.test) == count
    assert len(data.validation.classes) == 2
    everything = [image for images in data.splits.values() for image in images.ids]
    assert len(set(everything)) == len(everything)
    for images in data.splits.values():
        for image, label in zip(images.images, images.labels, strict=True):
            assert decode(image)[0, 0, 0] == 20 * (label + 1)
    assert data.protocol.startswith("class-disjoint: ")
    assert str(len(testing)) in data.protocol


@pytest.mark.parametrize("name", ["cars196", "stanford_online_products"])
def test_folds_of_the_training_classes(name, tmp_path):
    features, classes = MOCKS[name]
    write(name, features, classes, tmp_path)
    runs = [
        load_tfds(DataConfig(name=f"tfds:{name}", path=str(tmp_path), folds=2, fold=fold))
        for fold in range(2)
    ]
    training, testing, _ = EXPECTED[name]
    validating = [data.validation.classes.tolist() for data in runs]
    assert sorted(validating[0] + validating[1]) == list(training)
    for data, other in zip(runs, validating[::-1], strict=True):
        assert data.train.classes.tolist() == other
        assert data.test.classes.tolist() == list(testing)
        assert data.test_fingerprint == runs[0].test_fingerprint


def test_ids_come_from_the_name_feature(tmp_path):
    cifar = load_mock("cifar100", tmp_path)
    assert all(re.fullmatch(r"(train|test)/\1_\d+\.jpg", name) for name in cifar.test.ids)
    birds = load_mock("caltech_birds2011", tmp_path)
    assert all(re.fullmatch(r"(train|test)/\1_\d+\.jpg", name) for name in birds.test.ids)
    cars = load_mock("cars196", tmp_path)
    assert re.fullmatch(r"(train|test)/\d{7}", cars.test.ids[0])
    assert cars.class_names[3] == "car3"


def test_batch_of_a_tfds_data_set(tmp_path):
    data = load_mock("cmaterdb", tmp_path)
    config = DataConfig(image_size=16, batch_size=4, images_per_class=2)
    pipeline = TrainPipeline(data.train, config, seed=0)
    for step, batch in enumerate(pipeline.iterate(0, 3)):
        np.testing.assert_array_equal(batch["image"], pipeline.batch(step)["image"])


def test_version_can_be_chosen_and_defaults_to_the_newest(tmp_path):
    features, classes = MOCKS["cmaterdb"]
    write("cmaterdb", features, classes, tmp_path)
    (tmp_path / "cmaterdb" / "1.0.0").rename(tmp_path / "cmaterdb" / "0.9.0")
    write("cmaterdb", features, classes, tmp_path, per_class=3)
    sizes = {
        suffix: len(load_tfds(DataConfig(name=f"tfds:cmaterdb{suffix}", path=str(tmp_path))).test)
        for suffix in ("", ":0.9.0", ":1.0.0")
    }
    assert sizes == {"": 24, ":0.9.0": 16, ":1.0.0": 24}


def test_ambiguous_configuration_is_an_error(tmp_path):
    features, classes = MOCKS["cmaterdb"]
    for config in ("bangla", "telugu"):
        write("cmaterdb", features, classes, tmp_path / config)
        (tmp_path / "cmaterdb").mkdir(exist_ok=True)
        (tmp_path / config / "cmaterdb").rename(tmp_path / "cmaterdb" / config)
    with pytest.raises(UserError) as error:
        load_tfds(DataConfig(name="tfds:cmaterdb", path=str(tmp_path)))
    assert str(error.value) == (
        f"data.name='tfds:cmaterdb' has several configurations in {tmp_path}: choose one of "
        "tfds:cmaterdb/bangla, tfds:cmaterdb/telugu"
    )
    assert len(load_tfds(DataConfig(name="tfds:cmaterdb/telugu", path=str(tmp_path))).test) == 16


def as_tfrecord(data_dir):
    """Rewrites the stated format of a prepared mock, as if it had been prepared by default."""
    features, classes = MOCKS["cmaterdb"]
    write("cmaterdb", features, classes, data_dir)
    folder = data_dir / "cmaterdb" / "1.0.0"
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for path in folder.glob("*array_record*"):
        path.rename(folder / path.name.replace("array_record", "tfrecord"))


def test_tfrecord_without_tensorflow_is_an_error(tmp_path, monkeypatch):
    as_tfrecord(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        load_tfds(DataConfig(name="tfds:cmaterdb", path=str(tmp_path)))
    assert str(error.value) == (
        f"data.name='tfds:cmaterdb' in {tmp_path}/cmaterdb/1.0.0 is stored as tfrecord, which "
        "only TensorFlow can read: install afa[tf], or prepare the data set again with "
        "file_format='array_record'"
    )


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs the tf extra")
def test_tfrecord_is_read_with_tensorflow(tmp_path):
    features, classes = MOCKS["cmaterdb"]
    write("cmaterdb", features, classes, tmp_path, "tfrecord")
    data = load_tfds(DataConfig(name="tfds:cmaterdb", path=str(tmp_path)))
    assert len(data.test) == 16
    assert decode(data.test.images[0]).shape == (8, 8, 3)


def test_unknown_name_suggests_the_nearest(tmp_path):
    with pytest.raises(UserError) as error:
        load_tfds(DataConfig(name="tfds:cars169", path=str(tmp_path)))
    assert str(error.value) == (
        f"data.name='tfds:cars169': not prepared in {tmp_path}, and TFDS knows no 'cars169'"
        "; did you mean 'cars196'?"
    )


def test_missing_data_dir_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere' is not a directory"):
        load_tfds(DataConfig(name="tfds:cars196", path=str(tmp_path / "nowhere")))


def test_failed_preparation_is_an_error_with_advice(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds, "builder", refuse)
    with pytest.raises(UserError) as error:
        load_tfds(DataConfig(name="tfds:cars196", path=str(tmp_path)))
    assert str(error.value) == (
        f"data.name='tfds:cars196' is not in {tmp_path} and could not be prepared (no route to "
        "host): prepare it elsewhere as array_record, and set data.path to that data_dir"
    )


def test_without_a_network_it_fails_quickly_and_leaves_no_files(tmp_path, monkeypatch):
    requests = []

    def nobody(host, *args, **kwargs):
        requests.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with pytest.raises(UserError, match=r"could not be prepared \(.*Temporary failure in name"):
        load_tfds(DataConfig(name="tfds:cifar100", path=str(tmp_path)))
    assert len(requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_failed_preparation_removes_empty_folders_and_keeps_files(tmp_path, monkeypatch):
    class Failing:
        url_infos = ()

        def download_and_prepare(self):
            (tmp_path / "cars196" / "2.1.0.incomplete").mkdir(parents=True)
            (tmp_path / "downloads" / "kept").mkdir(parents=True)
            (tmp_path / "downloads" / "kept" / "part").write_bytes(b"x")
            raise ConnectionError("reset")

    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: Failing())
    with pytest.raises(UserError, match="could not be prepared"):
        load_tfds(DataConfig(name="tfds:cars196", path=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
    assert (tmp_path / "downloads" / "kept" / "part").exists()


def test_data_set_without_classes_is_an_error_with_its_features(tmp_path):
    write("caption", {"image": IMAGE(), "text": TEXT()}, {"train": range(4)}, tmp_path)
    with pytest.raises(UserError) as error:
        load_tfds(DataConfig(name="tfds:caption", path=str(tmp_path)))
    assert str(error.value) == (
        "data.name='tfds:caption/1.0.0' has 0 class features, and one is needed "
        "(features: image, text)"
    )


def test_given_splits_with_shared_classes_are_an_error(tmp_path):
    features, _ = MOCKS["omniglot"]
    write("omniglot", features, {"train": range(6), "test": range(5, 9)}, tmp_path)
    with pytest.raises(UserError, match="found train, test with 1 classes in common"):
        load_tfds(DataConfig(name="tfds:omniglot", path=str(tmp_path)))
