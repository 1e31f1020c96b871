"""Interface of a benchmark: `Benchmark` and its results, `Figure`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int, Int64

from afa.data.types import Files, ImageSet
from afa.evaluation import statistics
from afa.evaluation.metrics.retrieval import scored_mean
from afa.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Figure:
    """One metric of a benchmark.

    Attributes:
      part: part of the test set or difficulty, such as "medium" or "Private"; "" for all.
      name: name in the literature.
      value: a fraction (0 to 1).
      interval: 95 % interval of a bootstrap over queries or their classes; None if the metric is
        not a mean.
      queries: number of queries.
    """

    part: str
    name: str
    value: float
    interval: Estimate | None
    queries: int


@dataclass(frozen=True)
class Benchmark:
    """Queries, gallery, and the function that computes the metrics from their descriptors.

    Attributes:
      name: key of `BENCHMARKS`.
      protocol: one sentence for the user: queries, gallery and metrics.
      queries: query images.
      gallery: gallery images.
      score: unit vectors of queries and gallery -> metrics.
    """

    name: str
    protocol: str
    queries: ImageSet
    gallery: ImageSet
    score: Callable[[Float32[np.ndarray, "q d"], Float32[np.ndarray, "n d"]], list[Figure]]


def mean_figure(
    part: str,
    name: str,
    values: Float[np.ndarray, "q"],
    groups: Int[np.ndarray, "q"] | None = None,
) -> Figure:
    """Mean over queries with its bootstrap interval.

    Args:
      part: as in `Figure`.
      name: as in `Figure`.
      values: one per query; NaN for a query without positives.
      groups: class of each query; the bootstrap resamples classes. None resamples queries.
    """
    scored = ~np.isnan(values)
    units = np.arange(len(values)) if groups is None else groups
    several = len(np.unique(units[scored])) > 1
    interval = statistics.bootstrap(values, groups) if several else None
    return Figure(part, name, scored_mean(values), interval, int(scored.sum()))


def image_set(
    files: Sequence[Path | str], ids: Sequence[str], labels: Int64[np.ndarray, "n"] | None = None
) -> ImageSet:
    """Makes an image set of files; without `labels` all labels are 0."""
    none = np.zeros(len(ids), np.int64)
    labels = none if labels is None else labels
    return ImageSet(Files(map(str, files)), labels, tuple(ids), none.astype(bool))
