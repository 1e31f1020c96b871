"""Class folders in every layout, class-disjoint, and every way they can be unusable."""

import json
import re

import numpy as np
import pytest

from afa.config import DataConfig
from afa.data import listing
from afa.data.images import encode_jpeg
from afa.data.sources.folder import load_folder
from afa.data.sources.registry import load, save_split
from afa.errors import UserError


def write_images(root, classes, count=3, seed=0):
    """Writes `count` small JPEG images into each class folder."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            (root / name / f"img_{i}.jpg").write_bytes(encode_jpeg(pixels))


def letters(count, first="a"):
    return [chr(ord(first) + i) for i in range(count)]


def load_from(root, **changes):
    return load_folder(DataConfig(name="folder", path=str(root), **changes))


def names(dataset, split):
    images = dataset.splits[split]
    return [dataset.class_names[c] for c in images.classes]


def test_plain_folder_is_halved(tmp_path):
    write_images(tmp_path, letters(11))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    data = load_from(tmp_path)
    assert names(data, "test") == letters(5, "g")
    assert sorted(names(data, "train") + names(data, "validation")) == letters(6)
    assert len(names(data, "validation")) == 2
    assert len(data.train) == 12
    assert data.test.ids[0] == "g/img_0.jpg"
    assert data.test.path(0) == str(tmp_path / "g" / "img_0.jpg")
    assert data.test.images[0] == (tmp_path / "g" / "img_0.jpg").read_bytes()
    assert data.protocol == (
        "class-disjoint: of 11 classes sorted by name the first 6 train "
        "(2 of them, drawn with data.split_seed=0, validate), the last 5 test"
    )


def test_shared_classes_of_split_folders_are_halved(tmp_path):
    """81 classes in train and test, 60 of them in val, one catalogue image each."""
    classes = [f"{i:02d}" for i in range(81)]
    write_images(tmp_path / "train", classes, 2)
    write_images(tmp_path / "test", classes, 2)
    write_images(tmp_path / "val", classes[:60], 1)
    write_images(tmp_path / "iconic", classes, 1)
    data = load_from(tmp_path)
    assert [len(names(data, split)) for split in ("train", "validation", "test")] == [33, 8, 40]
    assert names(data, "test") == classes[41:]
    for images, folders in (
        (data.train, {"train", "iconic"}),
        (data.validation, {"train", "val", "iconic"}),
        (data.test, {"test", "iconic"}),
    ):
        parts = [image.split("/")[0] for image in images.ids]
        assert set(parts) == folders
        np.testing.assert_array_equal(images.catalogue, np.array(parts) == "iconic")
    everything = [image for images in data.splits.values() for image in images.ids]
    assert len(set(everything)) == len(everything)


def test_disjoint_split_folders_are_used_unchanged(tmp_path):
    write_images(tmp_path / "train", letters(5))
    write_images(tmp_path / "test", letters(3, "p"))
    data = load_from(tmp_path)
    assert names(data, "test") == ["p", "q", "r"]
    assert len(names(data, "train")) == 3
    assert len(names(data, "validation")) == 2
    assert "split folders as given: 5 classes of train/ train" in data.protocol


def test_disjoint_validation_folder_is_used_unchanged(tmp_path):
    write_images(tmp_path / "train", letters(4))
    write_images(tmp_path / "validation", letters(2, "k"))
    write_images(tmp_path / "test", letters(3, "p"))
    data = load_from(tmp_path)
    assert names(data, "train") == letters(4)
    assert names(data, "validation") == ["k", "l"]


def test_train_folder_alone_is_halved(tmp_path):
    write_images(tmp_path / "train", letters(8))
    write_images(tmp_path / "gallery", letters(8), 1)
    data = load_from(tmp_path)
    assert names(data, "test") == letters(4, "e")
    assert int(data.test.catalogue.sum()) == 4


def test_split_seed_and_fraction_choose_the_validation_classes(tmp_path):
    write_images(tmp_path, letters(20), 2)
    drawn = [names(load_from(tmp_path, split_seed=seed), "validation") for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(names(load_from(tmp_path, validation_fraction=0.5), "validation")) == 5


def test_fingerprint_changes_with_the_data(tmp_path):
    write_images(tmp_path, letters(8))
    first = load_from(tmp_path).fingerprint
    assert load_from(tmp_path).fingerprint == first
    assert load_from(tmp_path, split_seed=3).fingerprint != first
    write_images(tmp_path, ["a"], 4)
    assert load_from(tmp_path).fingerprint != first


def test_few_unreadable_images_are_skipped_and_reported(tmp_path):
    write_images(tmp_path, letters(8), 4)
    content = (tmp_path / "b" / "img_1.jpg").read_bytes()
    (tmp_path / "b" / "img_1.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "g" / "img_0.jpg").write_bytes(b"")
    data = load_from(tmp_path, max_unreadable=0.1)
    assert len(data.skipped) == 2
    assert data.skipped[0].startswith("b/img_1.jpg: ") or data.skipped[1].startswith("b/img_1.jpg")
    assert "g/img_0.jpg: empty file" in data.skipped
    assert sum(map(len, data.splits.values())) == 30
    (tmp_path / "b" / "img_1.jpg").write_bytes(content)  # repaired: it counts again
    assert load_from(tmp_path, max_unreadable=0.1).skipped == ("g/img_0.jpg: empty file",)


def test_too_many_unreadable_images_are_an_error(tmp_path):
    write_images(tmp_path, letters(8), 5)
    for i in range(5):
        (tmp_path / "h" / f"img_{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert str(error.value) == (
        f"data.path={str(tmp_path)!r}: 5 of 40 images (12.5%) cannot be read, above "
        "data.max_unreadable=0.01: h/img_0.jpg: empty file, h/img_1.jpg: empty file, "
        "h/img_2.jpg: empty file, and 2 more"
    )


def test_missing_directory_is_an_error(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(UserError, match=re.escape(f"data.path={str(missing)!r} does not exist")):
        load_from(missing)


def test_file_instead_of_directory_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a directory"):
        load_from(tmp_path / "file")


def test_empty_path_is_an_error():
    with pytest.raises(UserError) as error:
        load_folder(DataConfig(name="folder"))
    assert str(error.value) == "data.path is empty, and data.name='folder' needs a directory"


@pytest.mark.parametrize("inside", [(), ("a/b/c",), ("train/a", "test/a")])
def test_directory_without_images_is_an_error(tmp_path, inside):
    for folder in inside:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert str(error.value).startswith(
        f"data.path={str(tmp_path)!r} contains no class folders with images (expected "
        "DIR/CLASS/IMAGE, or DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE)"
    )


def test_class_with_one_image_is_an_error(tmp_path):
    write_images(tmp_path, letters(8))
    write_images(tmp_path, ["ha"], 1)
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert str(error.value) == (
        f"{tmp_path.name}: class 'ha' has 1 readable image, and at least 2 are needed in every "
        "class: add some, or remove the class"
    )


@pytest.mark.parametrize("count", [1, 4, 6])
@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_too_few_classes_are_an_error(tmp_path, count, fraction):
    write_images(tmp_path, letters(count))
    with pytest.raises(UserError) as error:
        load_from(tmp_path, validation_fraction=fraction)
    assert str(error.value) == (
        f"data.path={str(tmp_path)!r} holds {count} {'class' if count == 1 else 'classes'}, and at "
        "least 7 are needed: half of them test, and of the others 2 train and 2 validate"
    )
    write_images(tmp_path, letters(7))
    data = load_from(tmp_path)
    assert [len(names(data, split)) for split in ("train", "validation", "test")] == [2, 2, 3]


def test_errors_of_too_few_training_classes_and_of_too_large_a_fraction(tmp_path):
    write_images(tmp_path / "train", letters(3))
    write_images(tmp_path / "test", letters(3, "p"))
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert str(error.value) == (
        "3 classes are left to train and validate on, and at least 4 are needed, 2 for each: add "
        "classes"
    )
    write_images(tmp_path / "train", letters(6))
    with pytest.raises(UserError) as error:
        load_from(tmp_path, validation_fraction=0.9)
    assert str(error.value) == (
        "data.validation_fraction=0.9 leaves 1 of 6 classes to train on, and 2 are needed: lower it"
    )


def test_one_test_class_is_an_error(tmp_path):
    write_images(tmp_path / "train", letters(6))
    write_images(tmp_path / "test", ["x"])
    with pytest.raises(UserError, match="1 test classes, and at least 2 are needed"):
        load_from(tmp_path)


def test_unknown_data_set_suggests_the_nearest_name():
    with pytest.raises(UserError) as error:
        load(DataConfig(name="foldr"))
    assert str(error.value) == (
        "data.name='foldr' is unknown; did you mean 'folder'? "
        "(allowed: synthetic, folder, gldv2, inshop, tfds:NAME)"
    )
    with pytest.raises(UserError, match="did you mean 'tfds:cars196'"):
        load(DataConfig(name="cars196"))


def test_split_file_is_written_atomically(tmp_path):
    write_images(tmp_path / "data", letters(8))
    data = load(DataConfig(name="folder", path=str(tmp_path / "data")))
    out = tmp_path / "run" / "split.json"
    out.parent.mkdir()
    save_split(data, out)
    save_split(data, out)
    stored = json.loads(out.read_text())
    assert stored["protocol"] == data.protocol
    assert stored["fingerprint"] == data.fingerprint
    assert stored["splits"]["test"] == {"classes": letters(4, "e"), "ids": list(data.test.ids)}
    assert [path.name for path in out.parent.iterdir()] == ["split.json"]


# ---- cross-validation ----------------------------------------------------------------------------


def test_every_training_class_is_in_one_validation_fold(tmp_path):
    write_images(tmp_path, letters(22), 2)
    runs = [load_from(tmp_path, folds=3, fold=i) for i in range(3)]
    validating = [set(names(data, "validation")) for data in runs]
    assert sorted(map(len, validating)) == [3, 4, 4]
    assert set.union(*validating) == set(letters(11))
    for data, part in zip(runs, validating, strict=True):
        assert set(names(data, "train")) == set(letters(11)) - part
        assert names(data, "test") == letters(11, "l")
        assert data.test_fingerprint == runs[0].test_fingerprint
    assert len({data.fingerprint for data in runs}) == 3
    assert "(3 of them, fold 2 of 3 with data.split_seed=0, validate)" in runs[2].protocol
    assert names(load_from(tmp_path, folds=3, split_seed=1), "validation") != sorted(validating[0])
    assert load_from(tmp_path).test_fingerprint == runs[0].test_fingerprint


def test_folds_include_the_classes_of_a_validation_folder(tmp_path):
    write_images(tmp_path / "train", letters(4))
    write_images(tmp_path / "validation", letters(2, "k"))
    write_images(tmp_path / "test", letters(3, "p"))
    runs = [load_from(tmp_path, folds=3, fold=i) for i in range(3)]
    both = [name for data in runs for name in names(data, "validation")]
    assert sorted(both) == [*letters(4), "k", "l"]
    assert all(len(data.train) == 12 and len(data.validation) == 6 for data in runs)
    assert "4 classes of train/ train with 2 of the validation folder (2 of them, fold 0" in (
        runs[0].protocol
    )


def test_too_many_folds_are_an_error(tmp_path):
    write_images(tmp_path, letters(10), 2)
    with pytest.raises(UserError) as error:
        load_from(tmp_path, folds=3)
    assert str(error.value) == (
        "data.folds=3 splits 5 classes into folds of 1, and 2 are needed in each: lower it, or add "
        "classes"
    )


# ---- queries and gallery -------------------------------------------------------------------------


def test_query_and_gallery_folders(tmp_path):
    write_images(tmp_path / "train", letters(6))
    write_images(tmp_path / "query", letters(3, "p"), 1)
    write_images(tmp_path / "gallery", letters(5, "p"), 2)
    write_images(tmp_path / "iconic", letters(6), 1)
    data = load_from(tmp_path)
    assert names(data, "test") == letters(5, "p")
    assert data.train.gallery is None and data.validation.gallery is None
    folders = np.array([image.split("/")[0] for image in data.test.ids])
    np.testing.assert_array_equal(data.test.gallery, folders == "gallery")
    assert (folders == "query").sum() == 3 and (folders == "gallery").sum() == 10
    assert data.train.catalogue.sum() + data.validation.catalogue.sum() == 6
    assert data.protocol.endswith(
        "the 5 test (query/ and gallery/); catalogue images join their class"
    )
    moved = tmp_path / "gallery" / "p" / "img_0.jpg"
    moved.rename(tmp_path / "query" / "p" / "img_9.jpg")
    assert load_from(tmp_path).test_fingerprint != data.test_fingerprint


def test_shared_classes_with_query_and_gallery_folders_and_an_unreadable_image(tmp_path):
    write_images(tmp_path / "train", letters(8))
    write_images(tmp_path / "query", letters(8), 1)
    write_images(tmp_path / "gallery", letters(8), 2)
    (tmp_path / "query" / "e" / "img_0.jpg").write_bytes(b"")
    data = load_from(tmp_path, max_unreadable=0.1)
    assert names(data, "test") == letters(4, "e")
    roles = [image.split("/")[0] == "gallery" for image in data.test.ids]
    np.testing.assert_array_equal(data.test.gallery, roles)
    assert len(roles) == 11


@pytest.mark.parametrize(
    ("folders", "expected"),
    [(("train", "query"), "query/ without gallery/"),
     (("train", "query", "gallery", "test"), "query/ and test/")],
)  # fmt: skip
def test_incomplete_query_and_gallery_layout_is_an_error(tmp_path, folders, expected):
    for folder in folders:
        write_images(tmp_path / folder, letters(4))
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert str(error.value) == (
        f"data.path={str(tmp_path)!r} holds {expected} (expected train/, query/ and gallery/)"
    )


# ---- what counts as an image, a class and a split ------------------------------------------------


def test_empty_split_folder_is_an_error(tmp_path):
    """A query/ without a gallery/ would be measured leave-one-out among the queries."""
    write_images(tmp_path / "train", letters(6))
    write_images(tmp_path / "query", letters(3, "p"))
    (tmp_path / "gallery" / "p").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    option = f"data.path={str(tmp_path)!r}"
    assert str(error.value) == f"{option}: gallery/ contains no class folders with images"


def test_images_in_subfolders_of_a_class_folder_belong_to_the_class(tmp_path):
    write_images(tmp_path, letters(12))
    for name in ("b", "k"):
        (tmp_path / name).rename(tmp_path / "moving")
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / "moving").rename(tmp_path / name / "deep" / "deeper")
    data = load_from(tmp_path)
    assert sorted(data.class_names) == letters(12)
    assert "k/deep/deeper/img_0.jpg" in data.test.ids
    assert data.skipped == (
        "images in subfolders of a class folder, which belong to that class (6): "
        "b/deep/deeper/img_0.jpg, b/deep/deeper/img_1.jpg, b/deep/deeper/img_2.jpg, and 3 more",
    )


def test_directory_with_images_only_in_subfolders_of_class_folders_is_an_error(tmp_path):
    write_images(tmp_path / "drone", letters(4))
    write_images(tmp_path / "satellite", letters(4))
    with pytest.raises(UserError, match=r"no image directly in a class folder.*drone/a/img_0.jpg"):
        load_from(tmp_path)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Valid"])
def test_names_of_the_validation_folder(tmp_path, name):
    write_images(tmp_path / "train", letters(4))
    write_images(tmp_path / name, letters(2, "k"))
    write_images(tmp_path / "test", letters(3, "p"))
    assert names(load_from(tmp_path), "validation") == ["k", "l"]


def test_train_and_valid_alone_are_split_folders(tmp_path):
    write_images(tmp_path / "train", letters(8))
    write_images(tmp_path / "valid", letters(8), 1)
    data = load_from(tmp_path)
    assert names(data, "test") == letters(4, "e")
    assert {name.split("/")[0] for name in data.validation.ids} == {"train", "valid"}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "test", "vaildation"), "did you mean validation/?"),
        (("train", "tests"), "did you mean test/?"),
        (("test", "val"), "holds test/, val/ without train/"),
    ],
)
def test_misspelt_split_folder_is_an_error(tmp_path, folders, expected):
    for folder in folders:
        write_images(tmp_path / folder, letters(4))
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert str(error.value).startswith(f"data.path={str(tmp_path)!r} holds ")
    assert expected in str(error.value)


def test_other_folders_next_to_split_folders_are_reported(tmp_path):
    write_images(tmp_path / "train", letters(4))
    write_images(tmp_path / "test", letters(3, "p"))
    write_images(tmp_path / "sketches", letters(3))
    assert load_from(tmp_path).skipped == (
        "folders that are not splits and are not read (1): sketches",
    )


def test_class_names_are_unicode_normalised(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_images(tmp_path / "train", [*letters(4), composed])
    write_images(tmp_path / "test", [*letters(2, "p"), decomposed])
    data = load_from(tmp_path)
    assert data.class_names.count(composed) == 1 and decomposed not in data.class_names
    assert data.protocol.startswith("class-disjoint: train/ and test/ share 1 classes")
    sets = [set(names(data, split)) for split in ("train", "validation", "test")]
    assert not sets[0] & sets[2] and not sets[1] & sets[2]


def test_nearly_equal_class_names_are_reported(tmp_path):
    write_images(tmp_path / "train", [*letters(4), "Red fox"])
    write_images(tmp_path / "test", [*letters(2, "p"), "red_fox"])
    (line,) = load_from(tmp_path).skipped
    assert line.startswith("classes 'Red fox' and 'red_fox' differ only in case")


def test_skipped_paths_are_reported(tmp_path):
    write_images(tmp_path, letters(8))
    content = (tmp_path / "a" / "img_0.jpg").read_bytes()
    for name in ("a/._img_0.jpg", "b/.thumbs/x.jpg", "b/@eaDir/x.jpg", "__MACOSX/c/x.jpg",
                 "c/raw.cr2", "outside.jpg", "notes/readme.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d" / "loop").symlink_to(tmp_path)
    data = load_from(tmp_path)
    assert data.class_names == tuple(letters(8))
    assert sum(map(len, data.splits.values())) == 24
    assert data.skipped == (
        "hidden files and folders (4): __MACOSX, a/._img_0.jpg, b/.thumbs, and 1 more",
        "images in unsupported formats (1): c/raw.cr2",
        "links to folders that are read already (1): d/loop",
        "images outside class folders, which are skipped (1): outside.jpg",
        "folders without images (1): notes",
    )


def test_class_in_an_unsupported_format_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "heif_installed", lambda: False)
    write_images(tmp_path, letters(8))
    for path in (tmp_path / "c").iterdir():
        path.rename(path.with_suffix(".HEIC"))
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert "class 'c' has 0 readable images" in str(error.value)
    assert "images in unsupported formats (3): c/img_0.HEIC" in str(error.value)


def test_run_directory_is_not_a_class(tmp_path):
    write_images(tmp_path, letters(8))
    run = tmp_path / "runs" / "first"
    for name in ("config.json", "split.json"):
        run.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    write_images(run / "searches", ["x"])
    data = load_from(tmp_path)
    assert data.class_names == tuple(letters(8))
    assert data.skipped == ("folders of results (1): runs/first",)
