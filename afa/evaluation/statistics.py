"""Confidence intervals over seeds and over queries, and tests between two paired runs.

Variation over seeds: the unit is a run (`mean_and_interval` of its metrics, or of paired
differences). Variation over images: the unit is a class, because queries of one class are not
independent (`bootstrap` and `sign_flip` resample classes).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.special import stdtrit

from afa.errors import UserError
from afa.evaluation.metrics.retrieval import check_finite

CONFIDENCE = 0.95
RESAMPLES = 10_000
CHUNK = 1000  # resamples at a time


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval [low, high]."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Float[np.ndarray, "q"],
    groups: Int[np.ndarray, "_"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Mean over queries with the percentile interval of a bootstrap over groups (Efron 1979).

    Groups are resampled because queries of one group are not independent.

    Args:
      values: one value per query; NaN (a query without positives) is left out.
      groups: class of each query; None resamples single queries.
      resamples: number of resamples; a 95 % interval needs some thousands.
      seed: seed of the resamples; the same seed gives the same interval.
      confidence: share of the resamples inside the interval.

    Raises:
      UserError: no query has a value, only one group, or an argument out of range.
    """
    sums, counts = _by_group(values, groups)
    _check_resampling(len(sums), resamples, confidence)
    draw = np.random.default_rng(seed)
    means = []
    for begin in range(0, resamples, CHUNK):
        chosen = draw.integers(0, len(sums), (min(CHUNK, resamples - begin), len(sums)))
        means.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def sign_flip(
    first: Float[np.ndarray, "q"],
    second: Float[np.ndarray, "q"],
    groups: Int[np.ndarray, "_"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Two-sided p-value of a paired permutation test with random signs (Fisher 1935).

    The share of random signs of the groups' differences for which the mean difference is at least
    as large as the observed one.

    Args:
      first: one value per query of one run.
      second: values of the other run, for the same queries in the same order.
      groups: class of each query; the queries of a class change sign together.
      resamples: number of sign patterns.
      seed: seed of the sign patterns.

    Returns:
      Between 1/(resamples + 1) and 1.

    Raises:
      UserError: different queries have values, no query has one, or only one group.
    """
    if np.any(np.isnan(first) != np.isnan(second)):
        raise UserError("the runs do not score the same queries: they cannot be paired")
    sums, _ = _by_group(first - second, groups)
    _check_resampling(len(sums), resamples, CONFIDENCE)
    draw, observed = np.random.default_rng(seed), abs(sums.sum())
    slack = 1e-12 * np.abs(sums).sum()  # rounding of sums in another order
    larger = 0
    for begin in range(0, resamples, CHUNK):
        signs = draw.integers(0, 2, (min(CHUNK, resamples - begin), len(sums))) * 2 - 1
        larger += int(np.sum(np.abs(signs @ sums) >= observed - slack))
    return (larger + 1) / (resamples + 1)


def mean_and_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % confidence interval (Student's t, n-1 degrees of freedom).

    Raises:
      UserError: fewer than two values, or one that is not finite.
    """
    sample = np.asarray(list(values), np.float64)
    if len(sample) < 2:
        raise UserError(f"an interval needs at least 2 values, not {len(sample)}")
    check_finite("values", sample)
    spread = sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean()), float(stdtrit(len(sample) - 1, (1 + CONFIDENCE) / 2) * spread)


def holm(p_values: Iterable[float]) -> Float64[np.ndarray, "n"]:
    """Adjusts p-values for the number of tests in a table (Holm 1979).

    Returns:
      Adjusted values in the order of the input: rejecting those below a level keeps the
      probability of one or more wrong rejections below that level.

    Raises:
      UserError: a value outside 0 to 1.
    """
    values = np.asarray(list(p_values), np.float64)
    if not np.all((values >= 0) & (values <= 1)):
        raise UserError("p-values must lie between 0 and 1")
    order = np.argsort(values, kind="stable")
    scaled = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def interquartile_mean(values: Iterable[float]) -> float:
    """Returns the mean of the middle half of the values (Agarwal et al. 2021, section 4.3).

    A quarter of the values is cut off at each end; a value at the border counts in part.

    Raises:
      UserError: no value, or one that is not finite.
    """
    sample = np.sort(np.asarray(list(values), np.float64))
    if not len(sample):
        raise UserError("an interquartile mean needs at least 1 value")
    check_finite("values", sample)
    edges = np.arange(len(sample) + 1)
    low, high = len(sample) / 4, 3 * len(sample) / 4
    weights = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)
    return float(sample @ weights / weights.sum())


def probability_of_improvement(first: Iterable[float], second: Iterable[float]) -> float:
    """Returns the probability that a run of the first side is better than one of the second, with
    ties counted by half (Mann & Whitney 1947; Agarwal et al. 2021, section 4.3).

    Raises:
      UserError: a side without values, or a value that is not finite.
    """
    one, other = (np.asarray(list(values), np.float64) for values in (first, second))
    if not (len(one) and len(other)):
        raise UserError("a probability of improvement needs at least 1 value on each side")
    for values in (one, other):
        check_finite("values", values)
    difference = one[:, None] - other[None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


# ---- helpers -----------------------------------------------------------------------------------


def _by_group(
    values: Float[np.ndarray, "q"], groups: Int[np.ndarray, "_"] | None
) -> tuple[Float64[np.ndarray, "g"], Int[np.ndarray, "g"]]:
    """Sum and number of the values of each group, without NaN."""
    scored = ~np.isnan(values)
    if not scored.any():
        raise UserError(f"none of the {len(values)} queries has a value")
    check_finite("values", values[scored])
    names = np.arange(len(values)) if groups is None else groups
    if len(names) != len(values):
        raise UserError(f"groups has {len(names)} entries for {len(values)} values")
    _, group = np.unique(names[scored], return_inverse=True)
    return np.bincount(group, weights=values[scored]), np.bincount(group)


def _check_resampling(groups: int, resamples: int, confidence: float) -> None:
    if groups < 2:
        raise UserError("at least 2 groups of queries are needed, not 1")
    if resamples < 1:
        raise UserError(f"resamples={resamples} must be at least 1")
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence} must lie between 0 and 1")
