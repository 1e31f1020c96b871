"""`experiments.index` and `experiments.search --index`: a gallery of the user's images."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from afa.errors import UserError
from afa.retrieval import gallery
from afa.retrieval.index import scann
from experiments import index, search


@pytest.fixture(scope="module")
def images(tiny_data, tmp_path_factory):
    """A folder of two classes that are not in the run, and one image without a class."""
    root = tmp_path_factory.mktemp("own") / "images"
    for name in ("class_10", "class_11"):
        shutil.copytree(tiny_data / "test" / name, root / name)
    shutil.copy(tiny_data / "test" / "class_09" / "img_0.jpg", root / "alone.jpg")
    return root


@pytest.fixture
def ask(capsys):
    """Runs the command; returns exit code, standard output and error."""

    def call(*words, command=index):
        code = command.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def built(tiny_finished, tiny_data, images, tmp_path_factory):
    """An index and a copy of its run in one folder that can be moved."""
    root = tmp_path_factory.mktemp("built")
    shutil.copytree(tiny_finished, root / "run")
    words = ["build", f"--run={root}/run", f"--images={images}", f"--out={root}/index"]
    unknown_queries = tiny_data / "test" / "class_08"
    assert index.main([*words, f"--calibrate={unknown_queries}", "--json"]) == 0
    return root


@pytest.fixture
def home(built, tmp_path):
    return shutil.copytree(built, tmp_path / "home")


def facts(out):
    return json.loads(out)


def test_a_folder_is_built_and_searched(ask, home, images):
    query = images / "class_11" / "img_1.jpg"
    code, out, err = ask(f"--index={home}/index", "--json", query, command=search)
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["hits"][0]["id"] == "class_11/img_1.jpg"
    assert answer["hits"][0]["class_name"] == "class_11"
    assert answer["hits"][0]["path"] == str(query)
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert answer["sheet"].startswith(f"{home}/index/searches/")
    code, out, _ = ask(f"--index={home}/index", "--false_matches=0.4", query, command=search)
    assert code == 0 and "no match" not in out


def test_info_add_and_remove(ask, home, images, tmp_path):
    info = facts(ask("info", f"--index={home}/index", "--json")[1])
    count = sum(1 for _ in images.rglob("*.jpg"))
    assert (info["count"], info["classes"], info["ids"]) == (count, 3, "text")
    more = tmp_path / "more"
    more.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(more / f"noise_{i}.png")
    (more / "broken.png").write_bytes(b"not an image")
    code, out, err = ask("add", f"--index={home}/index", f"--images={more}", "--json")
    assert code == 0 and "skipped broken.png" in err
    assert (facts(out)["before"], facts(out)["count"]) == (count, count + 3)
    code, out, err = ask("add", f"--index={home}/index", f"--images={more}")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: the index already contains 'noise_0.png'")
    code, out, _ = ask("add", f"--index={home}/index", f"--images={more}", "--replace", "--json")
    assert (code, facts(out)["count"]) == (0, count + 3)
    answer = ask(f"--index={home}/index", "--json", more / "noise_1.png", command=search)[1]
    assert json.loads(answer)["hits"][0]["id"] == "noise_1.png"
    code, out, _ = ask("remove", f"--index={home}/index", "noise_1.png", "alone.jpg", "--json")
    assert (code, facts(out)["count"]) == (0, count + 1)
    answer = ask(f"--index={home}/index", "--json", more / "noise_1.png", command=search)[1]
    assert "noise_1.png" not in [hit["id"] for hit in json.loads(answer)["hits"]]
    code, _, err = ask("remove", f"--index={home}/index", "nobody")
    assert (code, err) == (2, "error: the index contains no image 'nobody'\n")


def test_any_file_name_works_and_folders_of_results_are_skipped(ask, home, images, tmp_path):
    own = shutil.copytree(images / "class_10", tmp_path / "own")
    content = (own / "img_0.jpg").read_bytes()
    (own / "new\nline.jpg").write_bytes(content)
    (own / "._img_0.jpg").write_bytes(b"Mac OS X")
    words = ["build", f"--run={home}/run", f"--images={own}", f"--out={own}/index", "--json"]
    code, out, err = ask(*words)
    assert (code, facts(out)["gallery_size"]) == (0, 5)
    assert f"skipped in {own}: hidden files and folders (1): ._img_0.jpg\n" in err
    query = own / "new\nline.jpg"
    code, out, err = ask(f"--index={own}/index", query, command=search)
    assert (code, err, len(out.splitlines())) == (0, "", 6)
    assert "new\\nline.jpg" in out and "-results.png" in out.splitlines()[0]
    assert list((own / "index" / "searches").iterdir())
    code, out, err = ask(*words)
    assert (code, facts(out)["gallery_size"]) == (0, 5)
    assert f"skipped in {own}: folders of results (1): index\n" in err
    code, out, err = ask(f"--index={own}/index", "--json", own, command=search)
    assert (code, len(out.splitlines())) == (0, 5)
    assert err.count("folders of results (1): index") == 1
    words[3] = f"--out={own}"
    code, out, err = ask(*words)
    assert (code, out) == (2, "") and "is the folder of the images" in err


@pytest.mark.skipif(not scann.installed(), reason="ScaNN is not installed here")
def test_tune_and_verify(ask, home):
    code, out, _ = ask("tune", f"--index={home}/index", "--target_recall=0.9", "--json")
    assert code == 0
    tuned = facts(out)
    assert tuned["reached"] and tuned["recall_at_10"] >= 0.9
    assert tuned["curve"][-1][0] <= 1
    code, out, _ = ask("verify", f"--index={home}/index", "--json")
    assert code == 0 and facts(out)["recall_at_10"] == 1
    code, out, _ = ask("verify", f"--index={home}/index")
    assert code == 0 and "recall at 10" in out


def test_verify_detects_damaged_files(ask, home):
    shard = next((home / "index").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    code, out, err = ask("verify", f"--index={home}/index")
    assert (code, out) == (2, "")
    assert err == f"error: {shard} is not the file index.json names (sha256 differs)\n"


def test_another_run_is_refused(ask, home, images):
    manifest = home / "index" / "index.json"
    stored = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(stored | {"checkpoint": "step-7-of-another-run"}))
    query = images / "alone.jpg"
    code, _, err = ask(f"--index={home}/index", query, command=search)
    assert code == 2
    assert err.startswith("error: the index does not match: checkpoint 'step-7-of-another-run'")
    manifest.write_text(json.dumps(stored))
    (home / "run").rename(home / "renamed")
    code, _, err = ask(f"--index={home}/index", query, command=search)
    assert (code, "contains no run" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["buld"], "ACTION='buld' is unknown; did you mean 'build'?"),
        (["build"], "the following arguments are required: --run, --images, --out"),
        (["info", "--index=/nowhere"],
         "/nowhere contains no finished index: index.json is missing"),
        (["build", "--run=r", "--images=p", "--out=o", "--uri=scan://"],
         "retrieval.index='scan' is unknown; did you mean 'scann'?"),
        (["build", "--run=r", "--images=p", "--out=o"], "--run=r: contains no run "),
        (["build", "--run=r", "--images=p", "--out=o", "--uri=exact://", "--target_recall=0.9"],
         "retrieval.target_recall=0.9: only scann:// is tuned, not exact://"),
    ],
)  # fmt: skip
def test_user_errors_are_one_line(ask, words, line):
    code, out, err = ask(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {line}")


def test_folders_without_images(ask, home, tmp_path):
    for folder, text in ((tmp_path / "no", "does not exist"), (tmp_path, "contains no images")):
        empty = folder if folder != tmp_path else tmp_path / "empty"
        if empty.name == "empty":
            empty.mkdir()
        code, _, err = ask("add", f"--index={home}/index", f"--images={empty}")
        assert (code, err) == (2, f"error: {empty}: {text}\n")


def test_search_needs_a_run_or_an_index(ask, images):
    code, _, err = ask(images / "alone.jpg", command=search)
    assert (code, err) == (2, "error: --run=DIR or --index=DIR is missing\n")


def test_a_gallery_smaller_than_the_default_number_of_results(ask, home, images, tmp_path):
    """Three images, with a default of five: three results."""
    few = tmp_path / "few"
    few.mkdir()
    for i in range(3):
        shutil.copy(images / "class_11" / f"img_{i}.jpg", few)
    words = ["build", f"--run={home}/run", f"--images={few}", f"--out={tmp_path}/small"]
    assert ask(*words, "--uri=exact://")[0] == 0
    query = few / "img_0.jpg"
    code, out, err = ask(f"--index={tmp_path}/small", "--json", query, command=search)
    assert (code, err) == (0, "")
    assert len(json.loads(out)["hits"]) == 3
    code, _, err = ask(f"--index={tmp_path}/small", "--results=4", query, command=search)
    assert (code, err) == (2, "error: k=4 is not between 1 and 3, the images in the index\n")


def test_calibration_with_gallery_images_is_an_error(ask, home, images, tmp_path):
    words = ["build", f"--run={home}/run", f"--images={images}", f"--out={tmp_path}/new"]
    copies = tmp_path / "copies"
    copies.mkdir()
    shutil.copy(images / "class_10" / "img_2.jpg", copies / "renamed.jpg")
    for unknown in (images, images / "class_10", copies):
        code, out, err = ask(*words, f"--calibrate={unknown}")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: --calibrate: {unknown}/") and err.count("\n") == 1
        assert "is in the gallery too" in err
    assert not (tmp_path / "new").exists()


def test_an_unwritable_index_is_an_error_before_any_work(ask, home, images, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "embed_folder", lambda *given: pytest.fail("embedded"))
    (tmp_path / "file").write_text("")
    words = ["build", f"--run={home}/run", f"--images={images}"]
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/index"):
        code, out, err = ask(*words, f"--out={path}")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: --out={path}: cannot be written (")

    def refuse(directory, field):
        raise UserError(f"{field}={directory}: cannot be written (Read-only file system)")

    monkeypatch.setattr(index, "require_writable", refuse)
    for action in (["add", f"--images={images}", "--replace"], ["tune", "--target_recall=0.9"]):
        code, _, err = ask(*action, f"--index={home}/index")
        expected = f"error: --index={home}/index: cannot be written (Read-only file system)\n"
        assert (code, err) == (2, expected)
