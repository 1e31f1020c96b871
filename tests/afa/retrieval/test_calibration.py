"""Calibration of the "no match" threshold."""

import numpy as np
import pytest

from afa.errors import UserError
from afa.retrieval import calibration
from afa.retrieval.calibration import Calibration
from afa.retrieval.exact import normalise


def unit(seed, rows, dimension=8):
    draw = np.random.default_rng(seed)
    return normalise(draw.normal(size=(rows, dimension)).astype(np.float32))


def test_best_scores_ignore_the_class_of_the_query(monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK", 7)
    queries, gallery = unit(0, 20), unit(1, 50)
    labels, gallery_labels = np.arange(20) % 5, np.arange(50) % 10
    found = calibration.best_scores(queries, labels, gallery, gallery_labels)
    expected = [
        max(gallery[i] @ query for i in range(50) if gallery_labels[i] != label)
        for query, label in zip(queries, labels, strict=True)
    ]
    np.testing.assert_allclose(found.scores, np.sort(expected), atol=1e-6)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.35, 0.99])
def test_the_threshold_is_the_lowest_with_the_false_match_rate(rate):
    scores = tuple(np.sort(np.random.default_rng(2).random(100).astype(np.float32)).tolist())
    threshold = Calibration(scores).threshold(rate)
    assert np.mean(np.array(scores) >= threshold) <= rate
    lower = max(score for score in scores if score < threshold)
    assert np.mean(np.array(scores) >= lower) > rate


def test_equal_scores_are_all_rejected():
    assert Calibration((0.5,) * 10).threshold(0.3) > 0.5


def test_the_false_match_rate_holds_for_other_unknown_queries():
    gallery, unknown = unit(3, 300), np.full(2000, -1)
    made = calibration.best_scores(unit(4, 2000), unknown, gallery, np.arange(300))
    others = calibration.best_scores(unit(5, 2000), unknown, gallery, np.arange(300))
    for rate in (0.02, 0.1, 0.5):
        share = np.mean(np.array(others.scores) >= made.threshold(rate))
        assert share == pytest.approx(rate, abs=4 * np.sqrt(rate / 2000))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.threshold(0.0), "false_matches=0.0 must lie between 0 and 1"),
        (lambda c: c.threshold(1.0), "must lie between 0 and 1"),
        (lambda c: c.threshold(0.01), "with 20 unknown queries: the least is 0.05"),
        (lambda c: Calibration.load(None), "made without calibration: export and build it again"),
        (
            lambda c: calibration.best_scores(
                unit(0, 2), np.zeros(2, int), unit(1, 3), np.zeros(3, int)
            ),
            "no query is unknown",
        ),
        (
            lambda c: calibration.best_scores(
                unit(0, 0), np.zeros(0, int), unit(1, 3), np.zeros(3, int)
            ),
            "there are no queries to calibrate with",
        ),
    ],
)
def test_invalid_arguments_are_errors(call, message):
    with pytest.raises(UserError, match=message):
        call(Calibration(tuple(np.linspace(0, 1, 20).tolist())))
