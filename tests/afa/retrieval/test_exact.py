"""Exact search against NumPy, with ties, on one device and on eight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import METRICS, ROOT, SUPPORT

from afa.errors import UserError
from afa.evaluation.metrics.retrieval import Ranked, metrics_from_ranks
from afa.retrieval import exact


def embeddings(rows, dimension=4, seed=0):
    """Few distinct vectors whose products are exact in float32, so that many rows are equal."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (rows, dimension))
    return (signs / np.sqrt(dimension)).astype(np.float32)


def distinct(rows, dimension, seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return exact.normalise(values)


def brute_force(queries, gallery, exclude=None):
    scores = queries @ gallery.T
    if exclude is not None:
        excluding = np.flatnonzero(exclude >= 0)
        scores[excluding, exclude[excluding]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), order


def brute_ranks(queries, gallery, query_labels, gallery_labels, exclude):
    junk = exclude[:, None] == np.arange(len(gallery))
    positives = (query_labels[:, None] == gallery_labels) & ~junk
    return Ranked.from_scores(queries @ gallery.T, positives, junk).ranks


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes tiles, slabs and query blocks small, so that a few hundred rows need several."""
    monkeypatch.setattr(exact, "CPU_TILE_ROWS", 128)
    monkeypatch.setattr(exact, "CPU_SLAB_BYTES", 2 * 128 * 4 * 4)
    monkeypatch.setattr(exact, "QUERY_ROWS", 16)


@pytest.mark.parametrize("k", [1, 10, 700])
def test_topk_breaks_ties_by_row(small_tiles, k):
    queries, gallery = embeddings(37, seed=1), embeddings(700)
    assert exact.Gallery(gallery)._resident is None
    scores, rows = exact.topk(queries, gallery, k)
    expected_scores, expected_rows = brute_force(queries, gallery)
    np.testing.assert_array_equal(rows, expected_rows[:, :k])
    np.testing.assert_array_equal(scores, expected_scores[:, :k])


def test_topk_leaves_the_query_out(small_tiles):
    gallery = embeddings(300)
    queries, exclude = gallery[:50], np.where(np.arange(50) % 3, np.arange(50), -1)
    _, rows = exact.topk(queries, gallery, 299, exclude)
    np.testing.assert_array_equal(rows, brute_force(queries, gallery, exclude)[1][:, :299])


@pytest.mark.parametrize("recall", [1.0, 0.9])
def test_topk_by_the_maxima_of_groups(monkeypatch, recall):
    """Ten of a thousand rows, by the maxima of 32 groups, and by the path for accelerators, which
    is exact on this device."""
    monkeypatch.setattr(exact, "CPU_TILE_ROWS", 1024)
    monkeypatch.setattr(exact, "ACCELERATOR_TILE_ROWS", 1024)
    monkeypatch.setattr(exact.parallel, "accelerated", lambda: recall < 1)
    queries, gallery = embeddings(37, seed=1), embeddings(3000)
    scores, rows = exact.topk(queries, gallery, 10, recall=recall)
    expected_scores, expected_rows = brute_force(queries, gallery)
    np.testing.assert_array_equal(scores, expected_scores[:, :10])
    if recall == 1:
        np.testing.assert_array_equal(rows, expected_rows[:, :10])


@pytest.mark.parametrize(("memory", "tiles"), [(2**20, 2), (2**23, 6), (None, 6)])
def test_as_much_of_a_gallery_as_fits_stays_on_an_accelerator(monkeypatch, memory, tiles):
    """A quarter of its memory: 256 KiB hold 2 of 6 tiles of 128 KiB."""
    monkeypatch.setattr(exact, "ACCELERATOR_TILE_ROWS", 1024)
    monkeypatch.setattr(exact.parallel, "accelerated", lambda: True)
    monkeypatch.setattr(exact.parallel, "device_memory_bytes", lambda: memory)
    queries, vectors = distinct(5, 32, seed=1), distinct(6000, 32)
    gallery = exact.Gallery(vectors)
    assert [len(slab) for slab, _ in gallery.slabs()] == [tiles] * (6 // tiles)
    _, rows = exact.topk(queries, gallery, 10)
    np.testing.assert_array_equal(rows, brute_force(queries, vectors)[1][:, :10])


def test_topk_among_allowed_rows(small_tiles):
    queries, gallery = embeddings(20, seed=1), embeddings(700)
    allowed = np.random.default_rng(0).random(700) < 0.1
    scores, rows = exact.topk(queries, gallery, 100, allowed=allowed)
    similar = np.where(allowed, queries @ gallery.T, -np.inf)
    order = np.argsort(-similar, axis=1, kind="stable")[:, :100]
    count = int(allowed.sum())
    np.testing.assert_array_equal(rows[:, :count], order[:, :count])
    np.testing.assert_array_equal(scores, np.take_along_axis(similar, order, axis=1))
    assert count < 100 and np.all(rows[:, count:] == -1)


def test_topk_of_real_valued_vectors():
    queries, gallery = distinct(20, 33, seed=1), distinct(500, 33)
    scores, rows = exact.topk(queries, gallery, 5)
    expected_scores, expected_rows = brute_force(queries, gallery)
    np.testing.assert_array_equal(rows, expected_rows[:, :5])
    np.testing.assert_allclose(scores, expected_scores[:, :5], atol=1e-6)


@pytest.mark.parametrize("counted", [0, 50, 10**6], ids=["sorted", "both", "counted"])
def test_positive_ranks_break_ties_by_row(small_tiles, monkeypatch, counted):
    monkeypatch.setattr(exact, "COUNTED", counted)
    monkeypatch.setattr(exact, "SORTED_ENTRIES", 700 * 16)
    random = np.random.default_rng(3)
    gallery, labels = embeddings(700), random.integers(0, 9, 700)
    labels[:600] = labels[:600] ** 2 // 9  # classes of very different sizes
    queries = np.concatenate([gallery[:60], embeddings(40, seed=4)])
    query_labels = np.concatenate([labels[:60], random.integers(0, 12, 40)])  # 9 to 11 are absent
    exclude = np.concatenate([np.arange(60), np.full(40, -1)])
    ranks = exact.positive_ranks(queries, gallery, query_labels, labels, exclude)
    expected = brute_ranks(queries, gallery, query_labels, labels, exclude)
    np.testing.assert_array_equal(ranks, expected)
    absent = int((query_labels >= 9).sum())
    assert metrics_from_ranks(ranks).left_out == absent > 0


def test_ranks_of_a_large_class_cost_about_a_sort(monkeypatch):
    """Counting the rows before each of 1,000 positives among 1,500 took 20 times a full sort."""
    vectors = embeddings(1500, 16)
    labels = np.maximum(np.arange(1500) - 999, 0)
    rows = np.arange(0, 1500, 5)
    calls = vectors[rows], vectors, labels[rows], labels, rows
    ranks = exact.positive_ranks(*calls)

    def never():
        raise AssertionError("a large class is counted")

    monkeypatch.setattr(exact, "_count", never)
    large = labels[rows] == 0
    chosen = rows[large]
    found = exact.positive_ranks(vectors[chosen], vectors, labels[chosen], labels, chosen)
    np.testing.assert_array_equal(found, ranks[large])
    np.testing.assert_array_equal(ranks, brute_ranks(*calls))


def test_equal_rows_get_equal_similarities():
    one = distinct(1, 37)
    gallery = np.concatenate([distinct(400, 37, seed=2), np.repeat(one, 300, axis=0)])
    gallery = gallery[np.random.default_rng(0).permutation(len(gallery))]
    copies = np.flatnonzero((gallery == one).all(axis=1))
    _, rows = exact.topk(one, gallery, 300)
    np.testing.assert_array_equal(rows[0], copies)
    labels = np.arange(len(gallery))
    labels[copies] = -5
    ranks = exact.positive_ranks(one, gallery, np.array([-5]), labels)
    np.testing.assert_array_equal(ranks[0], np.arange(300))


def test_labels_beyond_the_precision_of_float32():
    large = 2**24
    gallery = np.eye(4, dtype=np.float32)
    labels = np.array([large, large + 1, large, large + 1])
    ranks = exact.positive_ranks(gallery, gallery, labels, labels, np.arange(4))
    np.testing.assert_array_equal(ranks, [[1], [2], [0], [1]])


def test_a_gallery_is_copied_to_the_devices_once():
    gallery = exact.Gallery(distinct(200, 8))
    queries = distinct(5, 8, seed=1)
    slabs = [slab for _ in range(2) for slab, _ in gallery.slabs()]
    assert slabs[0] is slabs[1]
    np.testing.assert_array_equal(
        exact.topk(queries, gallery, 3)[1], exact.topk(queries, gallery.vectors, 3)[1]
    )


def test_calls_of_similar_size_share_a_compilation(monkeypatch):
    traced = []
    real = exact._similarity
    monkeypatch.setattr(exact, "_similarity", lambda *given: traced.append(1) or real(*given))
    for cached in (exact._topk, exact._count):
        cached.cache_clear()
    for seed in range(4):
        gallery, queries = distinct(130 + seed, 8, seed), distinct(65 + seed, 8, seed)
        labels = np.arange(len(gallery)) % 20
        exact.topk(queries, gallery, 3)
        exact.positive_ranks(queries, gallery, labels[: len(queries)], labels)
    assert len(traced) == 2


@pytest.mark.parametrize("name", ["balanced", "longtail", "many_positives", "missing_class"])
def test_reference_figures_from_the_search_itself(name):
    path = METRICS / f"embeddings_{name}.json"
    given = json.loads(path.read_text())
    ranks = exact.positive_ranks(
        np.array(given["query"], np.float32),
        np.array(given["gallery"], np.float32),
        np.array(given["query_labels"]),
        np.array(given["gallery_labels"]),
        np.array(given["exclude"]),
    )
    means = metrics_from_ranks(ranks).means
    assert set(means) <= set(given["figures"])
    for key, value in means.items():
        assert value == pytest.approx(given["figures"][key], abs=1e-6)


def test_no_queries():
    gallery = distinct(5, 3)
    scores, rows = exact.topk(gallery[:0], gallery, 2)
    assert scores.shape == rows.shape == (0, 2)
    none = np.zeros(0, np.int64)
    assert exact.positive_ranks(gallery[:0], gallery, none, np.arange(5)).shape == (0, 0)


def test_queries_of_unknown_classes_have_no_ranks():
    gallery = distinct(5, 3)
    ranks = exact.positive_ranks(gallery[:2], gallery, np.array([8, 9]), np.arange(5))
    assert ranks.shape == (2, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "gallery: rows must be finite, but row 3 has length nan"),
        (np.inf, "gallery: rows must be finite, but row 3 has length inf"),
        (7.0, "gallery: rows must be unit vectors, but row 3 has length 7"),
    ],
)
def test_invalid_vectors_are_errors(value, message):
    gallery = distinct(5, 3)
    gallery[3] = [value, 0, 0]
    for call in (
        lambda: exact.topk(distinct(2, 3), gallery, 1),
        lambda: exact.positive_ranks(distinct(2, 3), gallery, np.arange(2), np.arange(5)),
    ):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(UserError, match=message.replace("gallery", "queries")):
        exact.topk(gallery, distinct(5, 3), 1)


def test_invalid_arguments_are_errors():
    gallery = distinct(5, 3)
    with pytest.raises(UserError, match="the gallery is empty"):
        exact.topk(gallery, gallery[:0], 1)
    with pytest.raises(UserError, match="queries have 4 dimensions, the gallery has 3"):
        exact.topk(distinct(2, 4), gallery, 1)
    with pytest.raises(UserError, match="k=6 is not between 1 and 5"):
        exact.topk(gallery, gallery, 6)
    with pytest.raises(UserError, match="k=5 is not between 1 and 4"):
        exact.topk(gallery, gallery, 5, np.arange(5))
    with pytest.raises(UserError, match="k=0 is not between 1 and 5"):
        exact.topk(gallery, gallery, 0)
    with pytest.raises(UserError, match="outside the gallery of 5 rows"):
        exact.topk(gallery, gallery, 1, np.arange(1, 6))


def test_normalise():
    vectors = np.array([[3, 4], [0, 1e-20]], np.float32)
    np.testing.assert_allclose(exact.normalise(vectors), [[0.6, 0.8], [0, 1]], atol=1e-7)
    with pytest.raises(UserError, match=r"1 of 2 vectors have no direction \(first: row 1\)"):
        exact.normalise(np.array([[3, 4], [0, 0]], np.float32))


EIGHT_DEVICES = """
import jax
import numpy as np
import test_exact as cases
from afa.retrieval import exact

assert jax.local_device_count() == 8
exact.CPU_TILE_ROWS, exact.CPU_SLAB_BYTES, exact.QUERY_ROWS = 128, 2 * 128 * 16, 4
gallery, labels = cases.embeddings(700), np.arange(700) % 31
queries, exclude = gallery[:45], np.arange(45)
_, rows = exact.topk(queries, gallery, 20, exclude)
np.testing.assert_array_equal(rows, cases.brute_force(queries, gallery, exclude)[1][:, :20])
ranks = exact.positive_ranks(queries, gallery, labels[:45], labels, exclude)
np.testing.assert_array_equal(
    ranks, cases.brute_ranks(queries, gallery, labels[:45], labels, exclude)
)
print("agrees")
"""


def test_eight_devices():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, SUPPORT, ROOT))),
    }
    command = [sys.executable, "-c", EIGHT_DEVICES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout == "agrees\n", result.stderr
