"""Verification metrics against explicit enumeration of all pairs."""

import numpy as np
import pytest

from afa.errors import UserError
from afa.evaluation.metrics import pairs


def labelled_vectors(rows=60, classes=6, spread=0.6, seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, rows)
    vectors = draw.normal(size=(classes, 8))[labels] + spread * draw.normal(size=(rows, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), labels


def every_pair(vectors, labels):
    i, j = np.triu_indices(len(labels), 1)
    return np.einsum("pd,pd->p", vectors[i], vectors[j]), labels[i] == labels[j]


def auroc_by_hand(scores, same):
    right, wrong = scores[same][:, None], scores[~same][None]
    return np.mean((right > wrong) + 0.5 * (right == wrong))


@pytest.mark.parametrize("tile", [7, 2048])
def test_every_pair_is_counted_once(monkeypatch, tile):
    monkeypatch.setattr(pairs, "TILE_ROWS", tile)
    vectors, labels = labelled_vectors()
    scores, same = every_pair(vectors, labels)
    found = pairs.count_pairs(vectors, labels)
    assert (found.same.sum(), found.different.sum()) == (same.sum(), (~same).sum())
    assert abs(pairs.auroc(found) - auroc_by_hand(scores, same)) <= found.resolution + 1e-6
    assert 0 < found.resolution < 1e-3


@pytest.mark.parametrize("tile", [7, 2048])
def test_pairs_of_queries_and_gallery_are_counted_once(monkeypatch, tile):
    monkeypatch.setattr(pairs, "TILE_ROWS", tile)
    vectors, labels = labelled_vectors()
    found = pairs.count_pairs_between(vectors[:20], vectors[20:], labels[:20], labels[20:])
    scores, same = vectors[:20] @ vectors[20:].T, labels[:20, None] == labels[None, 20:]
    assert (found.same.sum(), found.different.sum()) == (same.sum(), (~same).sum())
    exact = auroc_by_hand(scores.ravel(), same.ravel())
    assert abs(pairs.auroc(found) - exact) <= found.resolution + 1e-6
    with pytest.raises(UserError, match="labels has 19 entries for 20 vectors"):
        pairs.count_pairs_between(vectors[:20], vectors[20:], labels[:19], labels[20:])


def test_auroc_of_listed_scores_counts_ties_half():
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    same = np.array([True, True, False, False, False])
    assert pairs.auroc(pairs.counted(scores, same)) == pytest.approx((3 + 1 + 0.5 * 2) / 6)
    draw = np.random.default_rng(1)
    scores, same = draw.integers(0, 9, 200) / 9, draw.random(200) < 0.3
    found = pairs.auroc(pairs.counted(scores, same))
    assert found == pytest.approx(auroc_by_hand(scores, same), abs=1e-12)


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.02])
def test_fnmr_is_the_least_that_the_false_match_rate_allows(rate):
    vectors, labels = labelled_vectors(spread=1.0)
    scores, same = every_pair(vectors, labels)
    missed, threshold = pairs.fnmr_at_fmr(pairs.counted(scores, same), rate)
    assert np.mean(scores[~same] >= threshold) <= rate
    assert np.mean(scores[same] < threshold) == pytest.approx(missed)
    lower = scores[scores < threshold].max()
    assert np.mean(scores[~same] >= lower) > rate  # the next lower threshold accepts too many
    binned, _ = pairs.fnmr_at_fmr(pairs.count_pairs(vectors, labels), rate)
    assert binned == pytest.approx(missed, abs=0.02)


def test_fnmr_without_a_valid_threshold():
    scores, same = np.ones(10), np.arange(10) < 5
    assert pairs.fnmr_at_fmr(pairs.counted(scores, same), 0.5) == (1.0, float("inf"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, y: pairs.count_pairs(v, y[:-1]), "labels has 59 entries for 60 vectors"),
        (lambda v, y: pairs.count_pairs(v, y * 0), "0 negative pairs: at least one of each"),
        (lambda v, y: pairs.count_pairs(2 * v, y), "unit"),
        (lambda v, y: pairs.counted(np.array([1.0, np.nan]), np.array([True, False])), "NaN"),
        (lambda v, y: pairs.fnmr_at_fmr(pairs.count_pairs(v, y), 0.0), "must lie between 0 and 1"),
        (
            lambda v, y: pairs.fnmr_at_fmr(pairs.count_pairs(v, y), 1e-6),
            "cannot be measured with 1[0-9]{3} negative pairs: at least 1000000 are needed",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call(*labelled_vectors())
