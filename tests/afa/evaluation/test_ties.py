"""Metrics averaged over ties against enumeration of all orders."""

import itertools

import numpy as np
import pytest

from afa.errors import UserError
from afa.evaluation.metrics import retrieval as metrics
from afa.evaluation.metrics.retrieval import Ranked
from afa.evaluation.metrics.ties import Tied

FIGURES = {
    "recall_at_1": (lambda t: t.recall_at_k(1), lambda r: metrics.recall_at_k(r, 1)),
    "recall_at_3": (lambda t: t.recall_at_k(3), lambda r: metrics.recall_at_k(r, 3)),
    "precision_at_1": (lambda t: t.precision_at_k(1), lambda r: metrics.precision_at_k(r, 1)),
    "precision_at_4": (lambda t: t.precision_at_k(4), lambda r: metrics.precision_at_k(r, 4)),
    "r_precision": (Tied.r_precision, metrics.r_precision),
    "map_at_r": (Tied.map_at_r, metrics.map_at_r),
    "average_precision": (Tied.average_precision, metrics.average_precision),
}


def over_every_order(scores, right, figure):
    """The mean over all orders of the results, with ties in the order of the results."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        order = np.array(order)
        ranked = Ranked.from_scores(scores[None, order], right[None, order])
        found.append(figure(ranked)[0])
    return np.mean(found)


LISTS = [
    ([0.9, 0.9, 0.9, 0.5, 0.5, 0.1], [1, 0, 0, 1, 0, 0]),
    ([0.9, 0.5, 0.5, 0.5, 0.5, 0.1], [0, 1, 0, 1, 0, 1]),
    ([0.3] * 6, [1, 1, 0, 0, 0, 1]),
    ([0.9, 0.8, 0.8, 0.4, 0.4, 0.4], [0, 0, 0, 1, 0, 1]),
    ([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [0, 1, 0, 1, 1, 0]),
    ([0.7, 0.7, 0.7, 0.7, 0.2, 0.2], [1, 1, 1, 1, 1, 1]),
]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(("scores", "right"), LISTS)
def test_the_mean_over_every_order(name, scores, right):
    ours, plain = FIGURES[name]
    scores, right = np.array(scores), np.array(right, bool)
    found = ours(Tied.from_scores(scores[None], right[None]))
    np.testing.assert_allclose(found, [over_every_order(scores, right, plain)], atol=1e-12)


def table(rows=6, ties=True):
    draw = np.random.default_rng(4)
    scores = draw.integers(0, 4, (rows, 9)) / 4 if ties else draw.random((rows, 9))
    positives = draw.random((rows, 9)) < 0.4
    positives[0] = False
    return scores, positives, draw.random((rows, 9)) < 0.2


@pytest.mark.parametrize("name", FIGURES)
def test_without_ties_they_are_the_plain_figures(name):
    scores, positives, junk = table(ties=False)
    ours, plain = FIGURES[name]
    found = ours(Tied.from_scores(scores, positives, junk))
    ranked = Ranked.from_scores(scores, positives, junk)
    np.testing.assert_allclose(found, plain(ranked), atol=1e-12)
    assert np.isnan(found[0]) and not np.isnan(found[1:]).any()


@pytest.mark.parametrize("name", FIGURES)
def test_junk_leaves_the_groups_of_equal_scores(name):
    scores, positives, junk = table()
    ours = FIGURES[name][0]
    found = ours(Tied.from_scores(scores, positives, junk))
    for row in range(1, len(scores)):
        kept = ~junk[row]
        alone = Tied.from_scores(scores[row, kept][None], positives[row, kept][None])
        np.testing.assert_allclose(found[row], ours(alone)[0], atol=1e-12)


def test_a_list_that_junk_shortens_is_not_missed_behind_its_end():
    scores, right = np.array([[0.5, 0.5, 0.4, 0.3]]), np.array([[True, False, False, False]])
    junk = np.array([[False, False, True, True]])
    found = Tied.from_scores(scores, right, junk)
    assert [found.recall_at_k(k)[0] for k in (1, 2, 3, 4)] == [0.5, 1, 1, 1]
    assert found.precision_at_k(4)[0] == 0.25


def test_a_list_of_junk_alone_has_no_value():
    scores = np.array([[0.5, 0.5]])
    found = Tied.from_scores(scores, np.ones((1, 2), bool), np.ones((1, 2), bool))
    assert np.isnan(found.recall_at_k(1)) and np.isnan(found.map_at_r())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    scores = np.array([[0.1, 0.2], [0.3, value]])
    with pytest.raises(UserError, match=r"scores: 1 of 2 rows hold NaN or infinity"):
        Tied.from_scores(scores, np.ones((2, 2), bool))
