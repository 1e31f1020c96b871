"""Search with a finished run: results as text, JSON and images, and errors."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from PIL import Image

from afa.errors import UserError
from afa.retrieval.export import read_export
from afa.retrieval.rerank import serving
from afa.retrieval.rerank.diffusion import diffuse
from afa.retrieval.rerank.reciprocal import k_reciprocal
from afa.retrieval.search import Searcher
from experiments import search

OPTIONS = "(python -m experiments.search --help lists the options)"


def of_gallery(data, count, part="test"):
    """One image each of the last classes, which are the gallery of a tiny run."""
    return [str(data / part / f"class_{11 - i:02d}" / "img_0.jpg") for i in range(count)]


@pytest.fixture
def ask(tiny_copy, capsys):
    """Runs the command on a copy of the run; returns exit code, standard output and error."""

    def call(*words, run=tiny_copy):
        code = search.main([f"--run={run}", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(ask, tiny_copy):
    """Checks that the command fails with this line and leaves the run unchanged."""

    def check(line, *words, run=tiny_copy):
        before = tiny_run.listing(tiny_copy)
        assert ask(*words, run=run) == (2, "", f"error: {line}\n")
        assert tiny_run.listing(tiny_copy) == before

    return check


def test_answers_as_text(ask, tiny_data, tiny_copy):
    queries = of_gallery(tiny_data, 2)
    code, out, err = ask(*queries)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 2 * (1 + 5)
    for query, head, first in zip(queries, lines[::6], lines[1::6], strict=True):
        assert head.startswith(f"{query}  ->  {tiny_copy}/searches/img_0")
        class_name = query.split("/")[-2]
        assert first == f"   1   1.000  test/{class_name}/img_0.jpg  ({class_name})"
    for number, line in enumerate(lines[1:6], start=1):
        assert re.fullmatch(
            rf"  +{number} +-?[01]\.\d{{3}}  (test|iconic)/\S+  \(class_\d\d\)", line
        )


def test_takes_folders_addresses_and_standard_input(ask, tiny_data, tmp_path, monkeypatch):
    queries = of_gallery(tiny_data, 3)
    folder = tmp_path / "some images" / "deeper"
    folder.mkdir(parents=True)
    copies = [shutil.copy(query, folder / f"{i}.jpg") for i, query in enumerate(queries)]
    (folder / "notes.txt").write_text("no image")
    listed = io.StringIO(f"{queries[0]}\n\n{queries[2]}\n")
    monkeypatch.setattr("sys.stdin", listed)
    code, out, _ = ask("--json", folder.parent, folder.joinpath("0.jpg").as_uri(), "-", queries[1])
    assert code == 0
    answered = [json.loads(line)["query"] for line in out.splitlines()]
    expected = [*copies, copies[0], queries[0], queries[2], queries[1]]
    assert answered == [str(path) for path in expected]


def test_result_images_have_unique_names(ask, tiny_data, tmp_path):
    names = ("x/a.jpg", "y/a.jpg", "y/a-2.jpg", "y/A.jpg")
    known_query = of_gallery(tiny_data, 1)[0]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(known_query, tmp_path / name)
    sheets = tmp_path / "sheets"
    words = (f"--sheets={sheets}", "--json", *(tmp_path / name for name in names))
    code, out, _ = ask(*words)
    found = [json.loads(line)["sheet"] for line in out.splitlines()]
    expected = ["a", "a-2", "a-2-2", "A-3"]
    assert (code, found) == (0, [f"{sheets}/{name}-results.png" for name in expected])
    assert len(list(sheets.iterdir())) == 4


def test_a_query_may_have_any_name(ask, tiny_data, tmp_path):
    try:
        odd = shutil.copy(of_gallery(tiny_data, 1)[0], tmp_path / os.fsdecode(b"caf\xe9\n.jpg"))
    except OSError:
        pytest.skip("this file system allows only UTF-8")
    code, out, err = ask("--json", odd)
    assert (code, err, json.loads(out)["query"]) == (0, "", str(odd))
    code, out, err = ask(odd)
    assert (code, err) == (0, "") and "caf\\udce9\\n.jpg" in out.splitlines()[0]
    Path(odd).write_bytes(b"")
    code, out, err = ask(odd)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "caf\\udce9\\n.jpg" in err


def test_empty_standard_input_is_an_error(ask, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    expected = (2, "", "error: no query images: standard input was empty\n")
    assert ask("-") == expected


def test_unknown_queries_have_no_match(ask, tiny_data, tmp_path):
    noise = tmp_path / "noise.png"
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(noise)
    known_query = of_gallery(tiny_data, 1)[0]
    code, out, _ = ask("--json", "--false_matches=0.2", known_query, noise)
    assert code == 0
    known, other = (json.loads(line) for line in out.splitlines())
    assert known["match"] is True  # the image itself
    assert known["threshold"] == other["threshold"] < 1
    assert other["match"] is (other["hits"][0]["score"] >= other["threshold"])
    code, out, _ = ask("--false_matches=0.2", known_query, noise)
    assert ("no match" in out) is not other["match"]


@pytest.mark.parametrize("share", ["0", "1.5", "0.0001", "nan"])
def test_a_false_match_rate_that_cannot_be_measured_is_refused(ask, tiny_data, share):
    code, out, err = ask(f"--false_matches={share}", *of_gallery(tiny_data, 1))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: false_matches={float(share)}")


def test_answers_as_json(ask, tiny_data, tiny_copy):
    queries = of_gallery(tiny_data, 3)
    code, out, err = ask("--json", "--results=7", *queries)
    assert (code, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["query"] for answer in answers] == queries
    export = read_export(tiny_copy / "embeddings")[0]
    row_of = {name: i for i, name in enumerate(export.ids)}
    for query, answer in zip(queries, answers, strict=True):
        assert answer.keys() == {"query", "hits", "sheet", "without_sheet", "threshold", "match"}
        assert answer["threshold"] is answer["match"] is None
        assert answer["without_sheet"] == ""
        scores = [hit["score"] for hit in answer["hits"]]
        assert len(scores) == 7
        assert scores == sorted(scores, reverse=True)
        assert scores[0] == pytest.approx(1, abs=1e-4)
        assert answer["hits"][0]["path"] == query
        own = export.vectors[row_of[answer["hits"][0]["id"]]]
        for hit in answer["hits"]:
            assert hit.keys() == {"id", "class_name", "path", "score"}
            row = row_of[hit["id"]]
            assert export.classes[row] == hit["class_name"] == hit["id"].split("/")[1]
            assert hit["score"] == pytest.approx(float(export.vectors[row] @ own), abs=1e-4)


def test_images_of_the_answers(ask, tiny_data, tiny_copy, tmp_path):
    """One image per query, also for files with the same name."""
    code, out, _ = ask("--json", *of_gallery(tiny_data, 2), f"--sheets={tmp_path / 'sheets'}")
    assert code == 0
    sheets = [json.loads(line)["sheet"] for line in out.splitlines()]
    names = ["img_0-results.png", "img_0-2-results.png"]
    assert sheets == [str(tmp_path / "sheets" / name) for name in names]
    for path in sheets:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) >= 100
            assert len(set(np.asarray(image).reshape(-1, 3)[:, 0].tolist())) > 20
    assert not (tiny_copy / "searches").exists()


def test_a_query_in_another_format_finds_its_class(ask, tiny_data, tmp_path):
    """A PNG of another size that shows an object of the gallery."""
    with Image.open(of_gallery(tiny_data, 1)[0]) as image:
        query = tmp_path / "mein Bild.png"
        image.resize((64, 50)).save(query)
    code, out, _ = ask("--json", query)
    assert code == 0
    answer = json.loads(out)
    assert answer["hits"][0]["class_name"] == "class_11"
    assert answer["sheet"].endswith("mein Bild-results.png")


def test_a_moved_run_answers_as_before(ask, tiny_data, tiny_copy, tmp_path):
    queries = of_gallery(tiny_data, 2)
    before = [json.loads(line)["hits"] for line in ask("--json", *queries)[1].splitlines()]
    moved = tmp_path / "somewhere" / "else"
    moved.parent.mkdir()
    shutil.move(tiny_copy, moved)
    code, out, _ = ask("--json", *queries, run=moved)
    assert code == 0
    assert [json.loads(line)["hits"] for line in out.splitlines()] == before


def test_search_without_the_gallery_images(tiny_data, tiny_copy, tmp_path, capsys):
    """A search needs only the index; a message gives the reason for the missing result image."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    query = shutil.copy(of_gallery(data, 1)[0], tmp_path / "query.jpg")
    assert tiny_run.main(*tiny_run.words(data, tiny_copy)) == 0
    shutil.rmtree(data)
    capsys.readouterr()
    assert search.main([f"--run={tiny_copy}", str(query)]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    missing = data / "test" / "class_11" / "img_0.jpg"
    assert head == f"{query}  ->  no image: {missing}: No such file or directory"
    assert first.endswith("test/class_11/img_0.jpg  (class_11)")


def test_the_gallery_can_be_the_whole_data_set(tiny_data, tiny_copy):
    line = tiny_run.words(tiny_data, tiny_copy, **{"retrieval.gallery": "all"})
    assert tiny_run.main(*line, "--retrieval.index=exact://") == 0
    searcher = Searcher.load(tiny_copy)
    assert searcher.index.uri == "exact://"
    assert len(searcher.index) == 60
    query = tiny_data / "train" / "class_00" / "img_1.jpg"
    (answer,) = searcher.search([query], 1)
    assert answer.hits[0].id == "train/class_00/img_1.jpg"
    assert answer.sheet is not None and answer.sheet.is_file()


def test_reranks_with_the_settings_chosen_on_validation(ask, tiny_data, tiny_copy):
    query = of_gallery(tiny_data, 1)[0]
    code, out, err = ask("--rerank=k_reciprocal", query)
    assert (code, out) == (2, "")
    assert err == (
        "error: --rerank=k_reciprocal: its settings were not chosen yet; experiments.rerank "
        f"--run={tiny_copy} chooses them on validation classes\n"
    )
    kept = serving.save(tiny_copy, {"k-reciprocal": {"k1": 5, "k2": 2, "plain": 0.3}, "plain": {}})
    assert kept == ["k_reciprocal"]
    serving.save(tiny_copy, {"diffusion": {"graph": 3, "results": 2, "alpha": 0.9}})
    vectors = read_export(tiny_copy / "embeddings")[0].vectors
    own = vectors[[path.endswith(query) for path in read_export(tiny_copy / "embeddings")[0].paths]]
    for name, reranker in (
        ("k_reciprocal", k_reciprocal(vectors, k1=5, k2=2, plain=0.3)),
        ("diffusion", diffuse(vectors, graph=3, results=2, alpha=0.9)),
    ):
        hits = json.loads(ask("--json", f"--rerank={name}", "--results=12", query)[1])["hits"]
        best = np.sort(np.asarray(reranker(own, np.array([-1])))[0])[::-1][:12]
        np.testing.assert_allclose([hit["score"] for hit in hits], best, atol=1e-3)
    code, _, err = ask("--rerank=k_reciprocl", query)
    assert code == 2 and "did you mean 'k_reciprocal'?" in err
    code, _, err = ask("--rerank=diffusion", "--false_matches=0.5", query)
    assert (code, err) == (2, "error: --rerank and --false_matches exclude each other\n")


# ---- errors --------------------------------------------------------------------------------------


def test_directories_without_a_finished_run(refused, tiny_data, tiny_copy, tmp_path):
    query = of_gallery(tiny_data, 1)[0]
    refused(f"--run={tmp_path}: contains no run (config.json is missing)", query, run=tmp_path)
    (tiny_copy / "result.json").unlink()
    line = f"--run={tiny_copy}: the run is not finished; start it again to resume"
    refused(line, query)


def test_images_that_cannot_be_read(refused, ask, tiny_data, tmp_path):
    """All queries are checked before the first answer."""
    query, nowhere, broken = of_gallery(tiny_data, 1)[0], tmp_path / "no.jpg", tmp_path / "b.jpg"
    refused(f"{nowhere}: cannot be read (No such file or directory)", query, nowhere)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(f"{empty}: contains no images", query, empty)
    address = "https://example.org/a.jpg"
    refused(f"{address}: only file:// addresses of this machine can be read", query, address)
    broken.write_text("no image")
    refused(f"{broken}: is not a readable image (not an image of a known format)", query, broken)
    broken.write_bytes(Path(query).read_bytes()[:300])
    code, out, err = ask(query, broken)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: {broken}: is not a readable image \(.+\)\n", err)


def test_more_results_than_images(refused, tiny_data):
    query = of_gallery(tiny_data, 1)[0]
    for k in (31, 0):
        refused(f"k={k} is not between 1 and 30, the images in the index", f"--results={k}", query)


def test_invalid_options(refused, tiny_data):
    query = of_gallery(tiny_data, 1)[0]
    refused(f"--jsn is not an option; did you mean '--json'? {OPTIONS}", "--jsn", query)
    refused(f"--results='x' is not a whole number {OPTIONS}", "--results=x", query)
    refused(f"the following arguments are required: IMAGE {OPTIONS}")


def changed(run, **fields):
    """Changes the manifest of the run's gallery, as if copied from another run."""
    path = run / "embeddings" / "index.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | fields))
    return manifest


def test_embeddings_of_another_checkpoint(refused, tiny_data, tiny_copy):
    other = "step-12-0123456789abcdef"
    own = changed(tiny_copy, checkpoint=other)["checkpoint"]
    refused(
        f"{tiny_copy}/embeddings does not match the run: checkpoint {other!r}, not {own!r}; start "
        "the run again",
        of_gallery(tiny_data, 1)[0],
    )


def test_embeddings_of_another_preprocessing(refused, tiny_data, tiny_copy):
    own = changed(tiny_copy)["preprocessing"]
    other = own | {"image_size": 32}
    changed(tiny_copy, preprocessing=other)
    refused(
        f"{tiny_copy}/embeddings does not match the run: preprocessing {other!r}, not {own!r}; "
        "start the run again",
        of_gallery(tiny_data, 1)[0],
    )


def test_a_missing_checkpoint(refused, tiny_data, tiny_copy):
    shutil.rmtree(tiny_copy / "checkpoints" / "12")
    refused(f"{tiny_copy}/checkpoints has no checkpoint of step 12", of_gallery(tiny_data, 1)[0])


def test_a_configuration_of_another_version(refused, tiny_data, tiny_copy):
    path = tiny_copy / "config.json"
    content = json.loads(path.read_text())
    content["config"]["data"]["colour"] = "blue"
    path.write_text(json.dumps(content))
    query = of_gallery(tiny_data, 1)[0]
    refused("stored configuration: 'colour' is not a field of DataConfig", query)
    path.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is not a stored configuration \(.+\)$"):
        Searcher.load(tiny_copy)
