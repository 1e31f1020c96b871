"""How sure a figure is: intervals over seeds, over queries, and tests between two paired runs.

Two questions, two units. Would another seed say the same? The unit is a run: `mean_and_interval` of
its figures, or of the paired differences. Would other images say the same? The unit is a class
(queries of one object share its difficulty): `bootstrap` and `sign_flip` draw whole classes.
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
    """A mean, and the ends of its confidence interval."""

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
    """Mean over queries, with the percentile interval of a bootstrap over groups of queries
    (Efron 1979; whole groups are drawn because queries of one group are not independent).

    Args:
      values: one figure a query; NaN (a query without positives) is left out.
      groups: class of each query; None draws single queries.
      resamples: how many; the ends of an interval of 95 % need some thousands.
      seed: of the draws; the same seed gives the same interval.
      confidence: share of the resamples inside of the interval.

    Raises:
      UserError: no query has a value, only one group, or numbers out of range.
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
    """Two-sided p-value of a paired permutation test: how often is the mean difference as large as
    the one seen when every group's difference has a random sign (Fisher 1935)?

    Args:
      first: one figure a query of one run.
      second: the same queries, in the same order, of the other run.
      groups: class of each query: the queries of a class change sign together.

    Returns:
      Between 1/(resamples + 1) and 1.

    Raises:
      UserError: not the same queries have values, no query has one, or only one group.
    """
    if np.any(np.isnan(first) != np.isnan(second)):
        raise UserError("the runs do not score the same queries: they cannot be paired")
    sums, _ = _by_group(first - second, groups)
    _check_resampling(len(sums), resamples, CONFIDENCE)
    draw, seen = np.random.default_rng(seed), abs(sums.sum())
    slack = 1e-12 * np.abs(sums).sum()  # the same sum in another order is as large
    larger = 0
    for begin in range(0, resamples, CHUNK):
        signs = draw.integers(0, 2, (min(CHUNK, resamples - begin), len(sums))) * 2 - 1
        larger += int(np.sum(np.abs(signs @ sums) >= seen - slack))
    return (larger + 1) / (resamples + 1)


def mean_and_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval (Student's t, n-1 degrees of freedom).

    Raises:
      UserError: fewer than two values, or one that is not finite.
    """
    sample = np.asarray(list(values), np.float64)
    if len(sample) < 2:
        raise UserError(f"an interval needs at least 2 values, not {len(sample)}")
    check_finite("values", sample)
    spread = sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean()), float(stdtrit(len(sample) - 1, (1 + CONFIDENCE) / 2) * spread)


# ---- helpers -----------------------------------------------------------------------------------


def _by_group(
    values: Float[np.ndarray, "q"], groups: Int[np.ndarray, "_"] | None
) -> tuple[Float64[np.ndarray, "g"], Int[np.ndarray, "g"]]:
    """Sum and number of the values of each group; queries without a value do not count."""
    scored = ~np.isnan(values)
    if not scored.any():
        raise UserError(f"none of the {len(values)} queries has a value")
    check_finite("values", values[scored])
    names = np.arange(len(values)) if groups is None else groups
    if len(names) != len(values):
        raise UserError(f"groups has {len(names)} entries for {len(values)} values")
    _, place = np.unique(names[scored], return_inverse=True)
    return np.bincount(place, weights=values[scored]), np.bincount(place)


def _check_resampling(groups: int, resamples: int, confidence: float) -> None:
    if groups < 2:
        raise UserError("at least 2 groups of queries are needed, not 1")
    if resamples < 1:
        raise UserError(f"resamples={resamples} must be at least 1")
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence} must lie between 0 and 1")
