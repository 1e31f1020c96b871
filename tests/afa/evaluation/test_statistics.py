"""Intervals and paired tests, against tables, enumeration and simulation."""

import itertools
import json

import numpy as np
import pytest
from paths import METRICS

from afa.errors import UserError
from afa.evaluation import statistics
from afa.evaluation.statistics import Estimate


def near(value, expected):
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)


def test_interval_of_ten_seeds():
    given = json.loads((METRICS / "interval.json").read_text())
    near(statistics.mean_and_interval(given["values"]), (given["mean"], given["half_width"]))


@pytest.mark.parametrize(
    ("freedom", "expected"),  # the usual table of the two-sided 95 % quantile
    [
        (1, 12.7062047),
        (2, 4.3026527),
        (3, 3.1824463),
        (4, 2.7764451),
        (9, 2.2621572),
        (30, 2.0422725),
        (1000, 1.9623391),
    ],
)
def test_student_t(freedom, expected):
    values = np.arange(freedom + 1.0)
    half = statistics.mean_and_interval(values)[1]
    near(half / (values.std(ddof=1) / len(values) ** 0.5), expected)


def test_interval_needs_two_finite_values():
    with pytest.raises(UserError, match="at least 2 values, not 1"):
        statistics.mean_and_interval([0.5])
    with pytest.raises(UserError, match="values: 1 of 3 rows hold NaN"):
        statistics.mean_and_interval([0.5, float("nan"), 0.6])


# ---- over queries ------------------------------------------------------------------------------


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    """Classes differ more than queries, so an interval over single queries would be too narrow."""
    groups = np.repeat(np.arange(30), 10)
    covered, covered_naively = 0, 0
    for trial in range(200):
        draw = np.random.default_rng(trial)
        values = draw.normal(0, 1, 30)[groups] + draw.normal(0, 0.5, 300)
        found = statistics.bootstrap(values, groups, resamples=400, seed=trial)
        near(found.mean, values.mean())
        covered += found.low <= 0 <= found.high
        naive = statistics.bootstrap(values, resamples=400, seed=trial)
        covered_naively += naive.low <= 0 <= naive.high
    assert 0.88 <= covered / 200 <= 0.99
    assert covered_naively / 200 < 0.7


def test_bootstrap_weighs_queries_not_classes_and_skips_those_without_a_value():
    values = np.array([1.0, 1.0, 1.0, 0.0, np.nan])
    found = statistics.bootstrap(values, np.array([7, 7, 7, 9, 9]), resamples=500)
    near(found.mean, 0.75)
    assert (found.low, found.high) == (0, 1)
    again = statistics.bootstrap(values, np.array([7, 7, 7, 9, 9]), resamples=500)
    assert found == again == Estimate(0.75, 0.0, 1.0)


def test_sign_flip_is_the_share_of_all_sign_patterns():
    first, second = np.array([0.9, 0.7, 0.8, 0.4, 0.6]), np.array([0.5, 0.6, 0.5, 0.5, 0.2])
    difference = first - second
    patterns = itertools.product((-1, 1), repeat=5)
    larger = [abs(np.dot(signs, difference)) >= difference.sum() - 1e-9 for signs in patterns]
    found = statistics.sign_flip(first, second, resamples=40_000)
    assert abs(found - np.mean(larger)) < 0.01


def test_sign_flip_of_equal_runs_is_one_and_of_grouped_ones_cautious():
    draw = np.random.default_rng(0)
    values = draw.random(40)
    assert statistics.sign_flip(values, values, resamples=99) == 1
    shifted = values + 0.1 + draw.normal(0, 0.01, 40)
    assert statistics.sign_flip(shifted, values, resamples=999) == 1 / 1000
    # Four classes have sixteen sign patterns: no p-value below 2/16 can come of them.
    assert statistics.sign_flip(shifted, values, np.repeat(np.arange(4), 10)) > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: statistics.bootstrap(v * np.nan), "none of the 3 queries has a value"),
        (lambda v: statistics.bootstrap(v, np.zeros(3, int)), "at least 2 groups of queries"),
        (lambda v: statistics.bootstrap(v, np.zeros(2, int)), "groups has 2 entries for 3 values"),
        (lambda v: statistics.bootstrap(v, resamples=0), "resamples=0 must be at least 1"),
        (lambda v: statistics.bootstrap(v, confidence=1.0), "confidence=1.0 must lie between"),
        (lambda v: statistics.bootstrap(v / [1, 1, 0]), "values: 1 of 3 rows hold NaN or infinity"),
        (lambda v: statistics.sign_flip(v, v * [1, 1, np.nan]), "cannot be paired"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call(np.array([0.1, 0.2, 0.4]))


def test_p_values_are_adjusted_for_their_number():
    """By hand: 0.01 x 4, 0.02 x 3, 0.03 x 2 below the value before it, 0.5."""
    found = statistics.holm([0.03, 0.01, 0.5, 0.02])
    np.testing.assert_allclose(found, [0.06, 0.04, 0.5, 0.06])
    np.testing.assert_allclose(statistics.holm([0.6, 0.9]), [1.0, 1.0])
    assert len(statistics.holm([])) == 0
    with pytest.raises(UserError, match="between 0 and 1"):
        statistics.holm([0.1, np.nan])


def test_interquartile_means():
    """The four middle ones of eight values; of five, one and three quarters of its neighbours."""
    assert statistics.interquartile_mean(
        [100.0, 3.0, 1.0, 2.0, 4.0, -50.0, 5.0, 6.0]
    ) == pytest.approx(3.5)
    assert statistics.interquartile_mean([1.0, 2.0, 3.0, 4.0, 50.0]) == pytest.approx(
        (0.75 * 2 + 3 + 0.75 * 4) / 2.5
    )
    assert statistics.interquartile_mean([7.0]) == 7.0
    with pytest.raises(UserError, match="at least 1 value"):
        statistics.interquartile_mean([])


def test_probability_of_improvement():
    """Of six pairs, three are better and one is equal."""
    assert statistics.probability_of_improvement([1.0, 3.0], [0.0, 2.0, 3.0]) == pytest.approx(
        3.5 / 6
    )
    assert statistics.probability_of_improvement([1.0], [1.0]) == 0.5
