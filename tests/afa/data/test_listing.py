"""Listing of the images in a folder, and reporting of what is skipped."""

import os
import shutil

import pytest

from afa.data import listing
from afa.data.listing import images_under, near_equal, some_under
from afa.errors import UserError, printable


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_images_of_all_subfolders_are_sorted(tmp_path):
    touch(tmp_path, "b/2.PNG", "a.jpg", "b/c/1.webp", "b/c.txt", "b.d/0.tiff", "a/x.jpeg")
    found = images_under(tmp_path)
    assert found.ids == ["a/x.jpeg", "a.jpg", "b/2.PNG", "b/c/1.webp", "b.d/0.tiff"]
    assert found.paths == sorted(tmp_path / name for name in found.ids)
    assert found.summaries() == []


def test_hidden_and_system_files_are_skipped_and_reported(tmp_path):
    touch(tmp_path, "p0.jpg", "._p0.jpg", ".DS_Store", ".thumbs/x.jpg", "a/@eaDir/y.jpg",
          "__MACOSX/z.jpg")  # fmt: skip
    found = images_under(tmp_path)
    assert found.ids == ["p0.jpg"]
    assert found.summaries() == [
        "hidden files and folders (4): ._p0.jpg, .thumbs, __MACOSX, and 1 more"
    ]


def test_formats_without_a_decoder_are_skipped_and_reported(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "b.heic", "c.HEIF", "d.avif", "e.cr2")
    monkeypatch.setattr(listing, "heif_installed", lambda: False)
    monkeypatch.setattr(listing.features, "check", lambda name: name != "avif")
    found = images_under(tmp_path)
    assert found.ids == ["a.jpg"]
    assert found.summaries() == [
        "images in unsupported formats (4): b.heic, c.HEIF, d.avif, and 1 more"
    ]
    monkeypatch.setattr(listing, "heif_installed", lambda: True)
    monkeypatch.setattr(listing.features, "check", lambda name: True)
    assert images_under(tmp_path).ids == ["a.jpg", "b.heic", "c.HEIF", "d.avif"]


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    touch(tmp_path / "elsewhere", "deep/1.jpg", "2.jpg")
    root = tmp_path / "root"
    touch(root, "z/0.jpg")
    (root / "album").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(root / "z")
    (root / "z" / "loop").symlink_to(root)
    (root / "itself").symlink_to(root / "itself")
    (root / "file.jpg").symlink_to(root / "z" / "0.jpg")
    (root / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = images_under(root)
    assert found.ids == ["album/2.jpg", "album/deep/1.jpg", "file.jpg", "z/0.jpg"]
    assert sorted(found.summaries()) == [
        "broken links (1): broken.jpg",
        "links to folders that are read already (2): again, z/loop",
    ]


def test_names_that_are_not_utf8_are_skipped_and_reported(tmp_path):
    touch(tmp_path, "a.jpg", "caf\u00e9/line\nbreak.jpg")
    odd = os.fsdecode(b"caf\xe9.jpg")
    try:
        touch(tmp_path, odd, os.fsdecode(b"\xff/x.jpg"))
    except OSError:
        pytest.skip("this file system allows only UTF-8")
    found = images_under(tmp_path)
    assert found.ids == ["a.jpg", "caf\u00e9/line\nbreak.jpg"]
    assert found.summaries() == ["names that are not UTF-8 (2): caf\\udce9.jpg, \\udcff"]
    with pytest.raises(UserError, match="its name is not UTF-8"):
        images_under(tmp_path / os.fsdecode(b"\xff"))


def test_unreadable_folder_is_reported(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def closed(path):
        if path == tmp_path / "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    found = images_under(tmp_path)
    assert found.ids == ["a/1.jpg"]
    assert found.summaries() == ["folders that cannot be read (1): b"]
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError) as error:
        some_under(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: contains no images; skipped: folders that cannot be read (1): b"
    )
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        images_under(tmp_path / "b")


def test_folders_of_results_are_skipped(tmp_path):
    touch(tmp_path, "a.jpg", "run/config.json", "run/split.json", "run/searches/1.png",
          "index/index.json", "index/embeddings-1.parquet", "index/searches/2.png",
          "new/3.png", "album/index.json", "album/4.png")  # fmt: skip
    found = images_under(tmp_path, [tmp_path / "new", tmp_path / "not created yet"])
    assert found.ids == ["a.jpg", "album/4.png"]
    assert found.summaries() == ["folders of results (3): index, new, run"]


def test_missing_folder_file_and_empty_folder_are_errors(tmp_path):
    touch(tmp_path, "file")
    for path, text in (
        (tmp_path / "file", "is not a directory"),
        (tmp_path / "x", "does not exist"),
        (tmp_path, "contains no images"),
    ):
        with pytest.raises(UserError) as error:
            some_under(path)
        assert str(error.value) == f"{path}: {text}"


def test_nearly_equal_names():
    names = ["Cat", "cat", "red fox", "red_fox", "dog", "c++", "c", "1.5", "15"]
    assert near_equal(names) == [("Cat", "cat"), ("red fox", "red_fox")]


def test_names_are_printable_on_one_line():
    assert printable("a\nb\u2028\x07\udce9 é") == "a\\nb\\u2028\\x07\\udce9 é"
