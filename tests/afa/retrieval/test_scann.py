"""Known problems of ScaNN are handled; tuning of its settings by measurement."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest
from gallery import MANIFEST, agree, expected, records, vectors

from afa.errors import UserError
from afa.retrieval import exact, export, index
from afa.retrieval.index import flat, scann, tuning
from afa.retrieval.index.local import LocalIndex
from afa.retrieval.index.scann import Plan, ScannEngine
from afa.retrieval.records import Records

pytestmark = pytest.mark.skipif(not scann.installed(), reason="ScaNN is not installed here")

PLANS = {
    "brute_force": Plan(),
    "hashing": Plan("hashing"),
    "tree": Plan("tree", 20, 12),
    "soar": Plan("tree", 20, 8, soar=1.5),
    "pca": Plan("tree", 20, 12, reduced=6, reorder=200),
}
ONE_LEAF = Plan("tree", 20, 1)


@pytest.fixture
def exported(tmp_path):
    export.write_export(tmp_path / "embeddings", records(), MANIFEST)
    return tmp_path / "embeddings"


def test_the_rule_follows_the_size():
    assert scann.rule(19_999) == Plan()
    assert scann.rule(99_999) == Plan("hashing")
    assert scann.rule(1_000_000) == Plan("tree", 1000, 100)
    assert scann.planned(50, {"leaves": 80}) == Plan("tree", 50, 5)  # ScaNN fails for n < leaves
    assert scann.planned(50, {"reorder": 7}) == Plan(reorder=7)
    assert scann.planned(120_000, {"searched": 500}).searched == 346
    kept = Plan("hashing", reorder=20, tuned=True)
    assert scann.planned(150_000, {}, kept) == kept


@pytest.mark.parametrize("kind", PLANS)
def test_every_kind_has_a_high_recall(kind):
    rows, queries = vectors(600), vectors(50, seed=1)
    engine = ScannEngine.build(rows, PLANS[kind])
    found, scores = engine.search(queries, 10, None)
    best, best_scores = exact.topk(queries, rows, 10)[::-1]
    hits = np.mean([len(np.intersect1d(*pair)) for pair in zip(found, best, strict=True)]) / 10
    assert hits > 0.9
    close = found == best
    np.testing.assert_allclose(scores[close], best_scores[close], atol=1e-5)
    assert found.dtype == np.int64


@pytest.mark.parametrize("count", [1, 5, 200])
def test_missing_results_are_masked(count):
    """ScaNN fills them with row 0 and NaN, or for one query returns a shorter list."""
    engine = ScannEngine.build(vectors(600), ONE_LEAF)
    rows, scores = engine.search(vectors(count, seed=1), 600, None)
    missing = rows == -1
    # Training is not deterministic. Sometimes a leaf is empty: its queries are searched exactly.
    _, best = flat.topk(vectors(count, seed=1), vectors(600), 600)
    complete = ~missing.any(axis=1)
    np.testing.assert_allclose(scores[complete], best[complete], atol=1e-6)
    assert np.mean(complete) < 0.2
    assert np.all(scores[missing] == -np.inf)
    assert np.isfinite(scores[~missing]).all()
    for line in rows:
        found = line[line != -1]
        assert len(set(found)) == len(found) > 0


@pytest.mark.parametrize("count", [1, 4])
def test_a_query_on_an_empty_leaf_is_searched_exactly(count, monkeypatch):
    """Of one query ScaNN then returns an empty list, of several one with NaN."""
    rows, queries = vectors(600), vectors(count, seed=1)
    engine = ScannEngine.build(rows, ONE_LEAF)
    expected_rows, expected_scores = flat.topk(queries, rows, 5)
    found = expected_rows[:, ::-1].astype(np.uint32), expected_scores[:, ::-1].copy()
    found[0][0], found[1][0] = 0, np.nan

    class Searcher:
        def search(self, query, *_):
            return np.zeros(0, np.uint32), np.zeros(0, np.float32)

        def search_batched(self, *_):
            return found

    monkeypatch.setattr(engine, "searcher", Searcher())
    near, similar = engine.search(queries, 5, None)
    np.testing.assert_array_equal(near[0], expected_rows[0])
    np.testing.assert_allclose(similar[0], expected_scores[0], rtol=1e-6)
    np.testing.assert_array_equal(near[1:], found[0][1:])  # others keep what ScaNN found


def test_one_row_and_as_many_results_as_rows():
    engine = ScannEngine.build(vectors(1), scann.rule(1))
    assert engine.search(vectors(2, seed=1), 1, None)[0].tolist() == [[0], [0]]
    few = ScannEngine.build(vectors(7), scann.rule(7))
    assert sorted(few.search(vectors(1, seed=1), 7, None)[0][0]) == list(range(7))


def test_filtered_search_is_complete():
    """Also if all candidates of a query are filtered out: these queries are searched exactly."""
    rows = np.concatenate([vectors(400), -np.abs(vectors(200, seed=3))])
    engine = ScannEngine.build(rows, Plan("tree", 20, 2))
    queries = np.abs(vectors(80, seed=4))
    opposite = np.arange(600) >= 400
    found, scores = engine.search(queries, 5, opposite)
    gallery = Records.of(rows, np.arange(600))
    ids, best_scores = expected(queries, gallery, 5, opposite)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_allclose(scores, best_scores, atol=1e-5)
    most = np.arange(600) > 3
    assert np.all(engine.search(queries, 5, most)[0] > 3)


def test_a_range_search_is_complete():
    rows = vectors(3000)
    engine = ScannEngine.build(rows, Plan("tree", 10, 10, reorder=3000))
    similar = rows[:2] @ rows.T
    for score in (0.9, 0.2):
        for line, (found, scores) in zip(
            similar, engine.within(rows[:2], score, None), strict=True
        ):
            assert set(found) == set(np.flatnonzero(line >= score))
            np.testing.assert_allclose(scores, line[found], atol=1e-5)


def test_a_full_disk_leaves_the_old_index(exported, monkeypatch, capfd):
    built = index.build(exported, "scann://")

    class Full:
        def serialize(self, *_, **__):
            os.write(2, b"the log of a failure\n")
            raise RuntimeError("I/O error")

    monkeypatch.setattr(scann, "_build", lambda *_: Full())
    with pytest.raises(UserError, match=r"cannot write .*: I/O error; its content is unchanged"):
        index.build(exported, "scann://")
    assert capfd.readouterr().err == "the log of a failure\n"
    assert index.load(exported).manifest == json.loads(json.dumps(built.manifest))


def test_unexpected_damaged_and_missing_files_are_errors(exported):
    built = index.build(exported, "scann://")
    folder = exported / built.manifest["engine"]["folder"]
    extra = folder / "scann_docids.pkl"  # it would be unpickled
    extra.write_bytes(b"")
    with pytest.raises(UserError, match=r"scann_docids\.pkl does not belong to the index"):
        index.load(exported)
    extra.unlink()
    data = folder / "dataset.npy"
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"dataset\.npy is damaged"):
        index.load(exported)
    data.unlink()
    with pytest.raises(UserError, match=r"dataset\.npy is missing"):
        index.load(exported)


def test_nothing_is_written_to_the_terminal(exported, capfd):
    index.build(exported, "scann://?leaves=20")
    index.load(exported)
    assert capfd.readouterr() == ("", "")


def test_rebuilding_leaves_one_index(exported):
    index.build(exported, "scann://")
    first = {path.name for path in exported.iterdir()}
    index.build(exported, "scann://?leaves=10")
    second = {path.name for path in exported.iterdir()}
    assert len(first) == len(second) == 4  # manifest, lock, shard, folder
    assert len(first & second) == 3


def test_codes_use_the_pca_and_rescoring_all_dimensions():
    rows = clustered(2000, dimension=40)
    best = exact.topk(rows[:100], rows, 10)[1]
    hits = {}
    for reduced in (0, 16, 1):
        engine = ScannEngine.build(rows, Plan("tree", 20, 20, reduced=reduced, block=1, reorder=10))
        found, scores = engine.search(rows[:100], 10, None)
        np.testing.assert_allclose(
            scores, np.einsum("qd,qkd->qk", rows[:100], rows[found]), atol=1e-5
        )
        hits[reduced] = np.mean(
            [len(set(a) & set(b)) / 10 for a, b in zip(found, best, strict=True)]
        )
    assert hits[0] > 0.7 and hits[16] > 0.7 and hits[1] < 0.5


@pytest.mark.parametrize("count", [1, 3, 15, 16])
def test_a_tree_over_fewer_rows_than_codes(count):
    """As a tuned index from which most rows were removed."""
    rows, queries = records(rows=count), vectors(2, seed=1)
    made = index.create("scann://?leaves=4&searched=4&reorder=40&reduced=4", rows, dict(MANIFEST))
    agree(made.search(queries, 1), expected(queries, rows, 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_at_most_the_requested_threads_are_used(threads):
    """ScaNN uses the calling thread in addition to its own."""
    rows = clustered(20_000, dimension=64)
    engine = ScannEngine.build(rows, Plan("tree", 40, 40, reorder=400), threads=threads)
    queries = rows[:2000]
    engine.search(queries, 10, None)
    shares = []
    for _ in range(3):
        began, worked = time.perf_counter(), time.process_time()
        engine.search(queries, 10, None)
        shares.append((time.process_time() - worked) / (time.perf_counter() - began))
    assert max(shares) < threads + 0.2


# ---- tuning ------------------------------------------------------------------------------------


def clustered(rows, seed=0, dimension=16):
    """Clusters in 16 directions; more dimensions than that are nearly empty."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(40, 16))
    noisy = centres[random.integers(40, size=rows)] + 0.6 * random.normal(size=(rows, 16))
    wide = 0.05 * random.normal(size=(rows, dimension))
    wide[:, :16] = noisy
    return exact.normalise(wide.astype(np.float32))


@pytest.fixture(scope="module")
def tuned():
    notes = []
    return tuning.tune(clustered(6000), 0.9, 10, seconds=30.0, note=notes.append), notes


def test_tuning_reaches_its_target_and_takes_the_fastest(tuned):
    found, notes = tuned
    assert found.reached and found.point.recall >= 0.9
    reaching = [point for point in found.curve if point.recall >= 0.9]
    fastest = max(reaching, key=lambda point: point.queries_per_second)
    assert found.point == fastest
    assert found.engine.plan == dataclasses.replace(found.point.plan, tuned=True)
    assert any("tree of 155 leaves" in note for note in notes)
    kinds = {point.plan.kind for point in found.curve}
    assert kinds == {"brute_force", "hashing", "tree"}


def test_the_measured_recall_is_that_of_the_definition(tuned):
    found, rows = tuned[0], clustered(6000)
    truth = tuning.Truth.of(rows, 10, seed=0)
    ids = found.engine.search(truth.queries, 11, None)[0]
    hits = []
    for own, query, line in zip(truth.query_rows, truth.queries, ids, strict=True):
        similar = rows @ query
        similar[own] = -np.inf
        nearest = np.argsort(-similar)[:10]
        hits.append(len(set(nearest) & set(line)) / 10)
    assert np.mean(hits) == pytest.approx(found.point.recall, abs=2e-3)


def test_the_frontier_is_the_pareto_front(tuned):
    found = tuned[0]
    line = found.frontier()
    assert line == sorted(line)
    for recall, speed in line:
        assert not any(
            other.recall >= recall and other.queries_per_second > speed for other in found.curve
        )


def test_the_time_budget_ends_tuning_even_below_the_target():
    notes = []
    found = tuning.tune(clustered(6000), 0.9, 10, seconds=0.0, note=notes.append)
    assert len(notes) == 1  # the first index is always measured
    assert found.point.plan == Plan()
    hashing = ScannEngine.build(clustered(6000), Plan("hashing", block=8, reorder=10))
    assert tuning._recall(hashing, tuning.Truth.of(clustered(6000), 10)) < 0.99


def test_every_setting_is_tried_on_the_best_tree_so_far(monkeypatch):
    """All build settings: leaves, PCA, SOAR, codes, kind of k-means."""
    built = []
    real = ScannEngine.build.__func__

    def build(cls, rows, plan, threads=0):
        built.append(plan)
        return real(cls, rows, plan, threads)

    monkeypatch.setattr(ScannEngine, "build", classmethod(build))
    monkeypatch.setattr(tuning, "REORDERED", (40, 640))
    monkeypatch.setattr(tuning, "TIMED_SECONDS", 0.0)
    found = tuning.tune(clustered(6000, dimension=40), 0.8, 10, seconds=60.0)
    assert found.reached
    trees = [plan for plan in built if plan.kind == "tree"]
    assert {plan.soar for plan in trees} >= {0.0, 1.5}
    assert {plan.threshold for plan in trees} >= {0.2, 0.1, 0.0}
    assert {plan.spherical for plan in trees} == {True, False}
    assert {plan.block for plan in trees} == {1, 2, 4}
    assert {plan.reduced for plan in trees} >= {16, 32, 8}
    assert len({plan.leaves for plan in trees}) >= 3
    assert len(built) == len({tuning._made(plan) for plan in built})


def test_enough_dimensions_keep_nine_tenths():
    assert tuning.enough_dimensions(clustered(6000)) == 0  # no direction is empty
    wide = clustered(6000, dimension=80)
    assert tuning.enough_dimensions(wide) == 16
    assert (wide[:, :16] ** 2).sum() > tuning.KEPT * (wide**2).sum() > (wide[:, :8] ** 2).sum()
    few = np.ones((50, 24), np.float32) / 24**0.5
    assert tuning.enough_dimensions(few) == 8


@pytest.mark.parametrize("target", [0.0, 1.5, float("nan")])
def test_an_invalid_target_is_an_error(target):
    with pytest.raises(UserError, match=r"retrieval\.target_recall=.* must lie in \(0, 1\]"):
        tuning.tune(clustered(100), target)


def test_too_few_images_for_tuning():
    with pytest.raises(UserError, match="k=10 needs more than 10 images"):
        tuning.tune(clustered(10), 0.9)


def test_a_tuned_index_is_kept_and_rebuilt_as_tuned(tmp_path, tuned, monkeypatch):
    rows = Records.of(clustered(6000), np.arange(6000))
    export.write_export(tmp_path, rows, MANIFEST)
    plan = Plan("tree", 30, 9, reorder=77, soar=1.5, tuned=True)
    built = index.build(tmp_path, "scann://", ScannEngine.build(rows.vectors, plan))
    assert built.info()["engine"] == dataclasses.asdict(plan)
    again = index.load(tmp_path)
    queries = clustered(20, seed=5)
    results = built.search(queries, 10)
    agree(again.search(queries, 10), (results.ids, results.scores))
    assert isinstance(again, LocalIndex)
    again.compact()
    assert again.info()["engine"] == dataclasses.asdict(plan)
    figures = tuning.measure(again, rows)
    assert 0.5 < figures["recall_at_10"] <= 1
    assert all(value > 0 for value in figures.values())


def test_measuring_exact_search_and_copies_is_perfect():
    repeated = Records.of(np.repeat(vectors(20), 30, axis=0), np.arange(600))
    for uri in ("exact://", "scann://"):
        assert tuning.measure(index.create(uri, repeated), repeated)["recall_at_10"] == 1
    pair = Records.of(vectors(2), ["a", "b"])
    assert tuning.measure(index.create("exact://", pair), pair, 10)["recall_at_10"] == 1
