"""Indexes: the same answers as exact search, bound to their export, and ScaNN's traps closed."""

import importlib.util
import json
import os
import shutil

import numpy as np
import pytest

from afa.errors import UserError
from afa.retrieval import exact, export, index
from afa.retrieval.index import Index

ROWS, DIMENSION = 600, 8
MANIFEST = {"configuration": {}, "checkpoint": "step-5", "preprocessing": {"size": 64}}

needs_scann = pytest.mark.skipif(
    index.default_engine() != "scann", reason="ScaNN is not installed on this machine"
)
both_engines = pytest.mark.parametrize(
    "engine", ["exact", pytest.param("scann", marks=needs_scann)]
)
PLANS = {
    "brute_force": (10**6, 10**6),
    "hashing": (100, 10**6),
    "tree": (100, 500),
}


def vectors(rows=ROWS, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, DIMENSION)).astype(np.float32)
    return exact.normalise(values)


def make_export(directory, rows=ROWS, seed=0, **changes):
    export.write_embeddings(
        directory,
        vectors(rows, seed),
        [f"id-{i}" for i in range(rows)],
        np.zeros(rows, np.int64),
        ["p"] * rows,
        ["class"],
        MANIFEST | changes,
    )
    return directory


@pytest.fixture
def exported(tmp_path):
    return make_export(tmp_path / "embeddings")


def force(monkeypatch, kind):
    """Makes the rules choose a kind of index that is meant for many more rows."""
    monkeypatch.setattr(index, "HASHING_FROM", PLANS[kind][0])
    monkeypatch.setattr(index, "TREE_FROM", PLANS[kind][1])


def test_the_plan_follows_the_size():
    assert index.plan(19_999) == {"kind": "brute_force"}
    assert index.plan(99_999) == {"kind": "hashing"}
    assert index.plan(1_000_000) == {"kind": "tree", "leaves": 1000, "searched": 100}


@both_engines
def test_answers_are_those_of_exact_search(exported, engine):
    queries = vectors(20, seed=1)
    ids, scores = index.build(exported, engine=engine).search(queries, 10)
    expected_scores, rows = exact.topk(queries, vectors(), 10)
    assert ids == [tuple(f"id-{row}" for row in line) for line in rows]
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


@needs_scann
@pytest.mark.parametrize("kind", PLANS)
def test_every_kind_finds_nearly_all_and_moves(exported, tmp_path, monkeypatch, kind):
    force(monkeypatch, kind)
    monkeypatch.setattr(index, "SEARCHED_LEAVES", 0.5)
    built = index.build(exported, engine="scann")
    assert built.manifest["plan"]["kind"] == kind
    queries = vectors(50, seed=1)
    figures = index.measure(built, queries)
    assert figures["recall_at_10"] > 0.9
    assert all(value > 0 for value in figures.values())
    moved = tmp_path / "elsewhere"
    exported.rename(moved)
    again = Index.load(moved / "index")
    assert again.engine == "scann"
    np.testing.assert_array_equal(again.rows(queries, 10)[0], built.rows(queries, 10)[0])
    assert str(tmp_path) not in (moved / "index" / "index.json").read_text()


@needs_scann
def test_missing_results_are_masked(exported, monkeypatch):
    force(monkeypatch, "tree")
    monkeypatch.setattr(index, "SEARCHED_LEAVES", 0.0)  # a query visits a single leaf
    built = index.build(exported, engine="scann")
    rows, scores = built.rows(vectors(30, seed=1), ROWS)
    missing = rows == -1
    assert missing.any(axis=1).all()
    assert np.all(scores[missing] == -np.inf)
    assert np.isfinite(scores[~missing]).all()
    for line in rows:
        found = line[line != -1]
        assert len(set(found)) == len(found) > 0
    ids, similar = built.search(vectors(1, seed=1), ROWS)
    alone = built.rows(vectors(1, seed=1), ROWS)[0]  # a batch may visit another leaf
    assert len(ids[0]) == len(similar[0]) == (alone != -1).sum()
    assert index.measure(built, vectors(30, seed=1), k=10)["recall_at_10"] < 1


def test_measure_of_exact_search_is_perfect(exported):
    built = index.build(exported, engine="exact")
    figures = index.measure(built, vectors(30, seed=1))
    assert set(figures) == {
        "recall_at_10",
        "queries_per_second",
        "single_queries_per_second",
        "build_seconds",
    }
    assert figures["recall_at_10"] == 1
    with pytest.raises(UserError, match="no queries to measure with"):
        index.measure(built, vectors(0))


@both_engines
def test_bad_queries_are_refused(exported, engine):
    built = index.build(exported, engine=engine)
    queries = vectors(3)
    ids, scores = built.search(queries[:0], 5)
    assert ids == scores == []
    assert built.rows(queries[:0], 5)[0].shape == (0, 5)
    with pytest.raises(UserError, match="k=601 is not between 1 and 600"):
        built.search(queries, ROWS + 1)
    with pytest.raises(UserError, match="k=0 is not between 1 and 600"):
        built.search(queries, 0)
    with pytest.raises(UserError, match="queries have 4 dimensions, the index has 8"):
        built.search(queries[:, :4], 5)
    for value in (np.nan, np.inf):
        queries[1, 0] = value
        with pytest.raises(UserError, match="queries: rows must be finite, but row 1"):
            built.search(queries, 5)


@both_engines
def test_one_picture(tmp_path, engine):
    built = index.build(make_export(tmp_path / "one", rows=1), engine=engine)
    assert built.search(vectors(2, seed=1), 1)[0] == [("id-0",), ("id-0",)]


@both_engines
def test_an_index_over_another_export_is_refused(exported, engine):
    index.build(exported, engine=engine)
    make_export(exported, seed=3, checkpoint="step-9")
    with pytest.raises(
        UserError, match=r"does not fit: sha256 '.*checkpoint 'step-5', not 'step-9'"
    ):
        Index.load(exported / "index")
    index.build(exported, engine=engine)
    Index.load(exported / "index")


def test_a_query_from_another_model_is_refused(exported):
    index.build(exported, engine="exact")
    opened = Index.load(exported / "index")
    opened.require(checkpoint="step-5", preprocessing={"size": 64})
    with pytest.raises(UserError, match=r"preprocessing \{'size': 64\}, not \{'size': 96\}"):
        opened.require(checkpoint="step-5", preprocessing={"size": 96})


def test_without_scann(exported, tmp_path, monkeypatch):
    def missing(name, *_):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = r"engine='scann' cannot be used \(No module named 'scann'\): install scann"
    with pytest.raises(UserError, match=message):
        index.build(exported, tmp_path / "index", engine="scann")
    assert not (tmp_path / "index").exists()
    assert index.default_engine() == "exact"
    built = index.build(exported)
    assert built.engine == "exact"
    assert Index.load(exported / "index").search(vectors(1), 1)[0] == [("id-0",)]
    with pytest.raises(UserError, match=r"was built with engine='exact'"):
        Index.load(exported / "index", engine="scann")


def test_an_unknown_engine_is_refused(exported):
    index.build(exported, engine="exact")
    path = exported / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"engine": "scan"}))
    with pytest.raises(
        UserError, match=r"retrieval\.engine='scan' is unknown; did you mean 'scann'"
    ):
        Index.load(exported / "index")


@needs_scann
def test_a_scann_index_opens_with_the_exact_engine(exported):
    built = index.build(exported, engine="scann")
    opened = Index.load(exported / "index", engine="exact")
    assert opened.engine == "exact"
    assert opened.search(vectors(4), 5)[0] == built.search(vectors(4), 5)[0]


@needs_scann
def test_building_again_leaves_one_index(exported, tmp_path):
    out = tmp_path / "apart" / "index"
    index.build(exported, out)
    first = sorted(path.name for path in out.iterdir())
    make_export(exported, seed=5)
    index.build(exported, out)
    index.build(exported, out)
    second = sorted(path.name for path in out.iterdir())
    assert len(first) == len(second) == 2
    assert first != second
    Index.load(out)
    index.build(exported, out, engine="exact")
    assert [path.name for path in out.iterdir()] == ["index.json"]


@needs_scann
def test_a_full_disk_leaves_the_old_index(exported, monkeypatch, capfd):
    built = index.build(exported, engine="scann")

    class Full:
        def serialize(self, *_, **__):
            os.write(2, b"the log of a failure\n")
            raise RuntimeError("I/O error")

    monkeypatch.setattr(index, "_build_scann", lambda *_: Full())
    with pytest.raises(UserError, match=r"cannot write .*: I/O error; what it held is unchanged"):
        index.build(exported, engine="scann")
    assert capfd.readouterr().err == "the log of a failure\n"
    again = Index.load(exported / "index")
    assert again.manifest == json.loads(json.dumps(built.manifest))
    assert len(list((exported / "index").iterdir())) == 2


@needs_scann
def test_foreign_damaged_and_missing_files_are_refused(exported):
    built = index.build(exported, engine="scann")
    folder = exported / "index" / built.manifest["folder"]
    planted = folder / "scann_docids.pkl"
    planted.write_bytes(b"")
    with pytest.raises(UserError, match=r"scann_docids\.pkl does not belong to the index"):
        Index.load(exported / "index")
    planted.unlink()
    data = folder / "dataset.npy"
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"dataset\.npy is damaged"):
        Index.load(exported / "index")
    data.unlink()
    with pytest.raises(UserError, match=r"dataset\.npy is missing"):
        Index.load(exported / "index")
    shutil.rmtree(exported / "index")
    with pytest.raises(UserError, match=r"holds no finished index: index\.json is missing"):
        Index.load(exported / "index")


@needs_scann
def test_scann_does_not_write_to_the_terminal(exported, monkeypatch, capfd):
    force(monkeypatch, "tree")
    index.build(exported, engine="scann")
    Index.load(exported / "index")
    assert capfd.readouterr() == ("", "")


def test_copies_of_a_picture_are_no_loss(tmp_path):
    repeated = np.repeat(vectors(20), 30, axis=0)
    export.write_embeddings(
        tmp_path,
        repeated,
        [str(i) for i in range(600)],
        np.zeros(600, np.int64),
        ["p"] * 600,
        ["class"],
        MANIFEST,
    )
    built = index.build(tmp_path)
    assert index.measure(built, vectors(20), k=10)["recall_at_10"] == 1
