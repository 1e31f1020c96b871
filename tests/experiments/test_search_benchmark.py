"""The benchmark of search: its data, its measurements and its errors."""

import importlib.util

import numpy as np
import pytest

from afa.errors import UserError
from afa.retrieval import exact
from afa.retrieval.index import scann, tuning
from experiments.benchmarks import search as benchmark
from experiments.benchmarks.engines import ENGINES, LIBRARIES, Built


@pytest.fixture(scope="module")
def gallery():
    drawn = benchmark.clustered(3100, 16)
    queries, vectors = drawn[:100].copy(), drawn[100:]
    return vectors, queries, exact.topk(queries, vectors, benchmark.K)[0][:, -1]


def test_clustered_vectors_are_unit_and_clustered(gallery):
    vectors = gallery[0]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors.dtype == np.float32
    worst = gallery[2]
    assert np.median(worst) > np.quantile(vectors[:100] @ vectors.T, 0.99)
    np.testing.assert_array_equal(benchmark.clustered(50, 8), benchmark.clustered(50, 8))


def test_the_least_effort_with_a_recall(gallery):
    """An index whose recall grows by 0.1 per step of effort, limited by `reorder`."""
    vectors, queries, truth = gallery
    best = exact.topk(queries, vectors, benchmark.K)[1]

    def with_settings(effort, reorder):
        def search(queries, k):
            right = np.arange(k) < min(effort, reorder)
            return np.where(right, best, -1)

        return search

    built = Built("made up", list(range(1, 11)), (6, 9, 20), with_settings)
    found = list(benchmark._least(built, vectors, queries, truth, 0.9))
    assert [(effort, reorder) for effort, reorder, _ in found] == [(9, 9), (9, 20)]
    assert [recall for *_, recall in found] == pytest.approx([0.9, 0.9])
    assert next(benchmark._least(built, vectors, queries, truth, 0.99))[:2] == (10, 20)


@pytest.mark.parametrize(("fast", "rival"), [(False, "_faiss"), (True, "_torch_exact")])
def test_exact_search_alternates_with_one_that_agrees(gallery, monkeypatch, fast, rival):
    """With faiss on the CPU and with PyTorch on an accelerator, here stood in for by NumPy."""
    vectors, queries, _ = gallery
    order = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, : benchmark.K]
    monkeypatch.setattr(exact.parallel, "accelerated", lambda: fast)
    monkeypatch.setattr(benchmark, rival, lambda *given: {"other": lambda: (None, order)})
    found = benchmark._exact("title", vectors, queries, [], 0.0)
    assert set(found["queries_per_second"]) == {"afa exact://", "other"}
    monkeypatch.setattr(benchmark, rival, lambda *given: {"other": lambda: (None, order + 1)})
    with pytest.raises(UserError, match="the implementations disagree: 0"):
        benchmark._exact("title", vectors, queries, [], 0.0)


def test_exact_search_of_torch(gallery):
    pytest.importorskip("torch")
    vectors, queries, _ = gallery
    (search,) = benchmark._torch_exact(vectors, queries).values()
    scores, rows = search()
    expected_scores, expected = exact.topk(queries, vectors, benchmark.K)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    assert np.mean(rows == expected) > benchmark.AGREEING


@pytest.mark.parametrize("name", ENGINES)
def test_every_library_reaches_the_recalls(name, gallery, tmp_path, monkeypatch):
    library = LIBRARIES[name]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed here")
    monkeypatch.setattr(tuning, "TIMED_SECONDS", 0.01)
    vectors, queries, truth = gallery
    path = tmp_path / "vectors.npy"
    np.save(path, vectors)
    best, curve = benchmark.measure(name, str(path), queries, truth, 0.0)
    for way in ("batch", "single"):
        for target in benchmark.TARGETS:
            assert best[way][target].recall >= target
            assert best[way][target].speed > 0
    assert all(0.89 < recall <= 1 and speed > 0 for recall, speed in curve)


def test_the_frontier():
    curve = [(0.9, 5.0), (0.95, 4.0), (0.92, 3.0), (0.99, 1.0), (0.99, 0.5)]
    assert tuning.frontier(curve) == [(0.9, 5.0), (0.95, 4.0), (0.99, 1.0)]


@pytest.mark.skipif(not scann.installed(), reason="ScaNN is not installed here")
def test_overhead_of_the_index_interface(gallery, capsys):
    vectors, queries, _ = gallery
    found = benchmark._layer("a title", vectors, queries, (), 0.0)
    printed = " ".join(capsys.readouterr().out.split())
    assert "a title: index interface, one query per call" in printed
    assert all(speed > 0 for speed in found["batch"]["queries_per_second"].values())


def test_errors_are_reported(capsys):
    if importlib.util.find_spec("hnswlib") is None:
        assert benchmark.main([]) == 2
        assert "is not installed: pip install 'afa[bench]'" in capsys.readouterr().err
        return
    assert benchmark.main(["--engines=fais HNSW"]) == 2
    assert "--engines='fais HNSW' is unknown; did you mean 'faiss HNSW'?" in capsys.readouterr().err
