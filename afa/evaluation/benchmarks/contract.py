"""What a benchmark is to the command that runs it."""

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
    """One figure of a benchmark.

    Attributes:
      part: which answers it is about, such as "medium" or "Private"; "" for all.
      name: as the literature calls it.
      value: a fraction.
      interval: 95 %, of a bootstrap over queries or their classes; None where it is no mean.
      queries: number of queries it is taken over.
    """

    part: str
    name: str
    value: float
    interval: Estimate | None
    queries: int


@dataclass(frozen=True)
class Benchmark:
    """Queries and gallery, and what scores the descriptors of both.

    Attributes:
      protocol: one sentence: what is searched among what, and what counts.
      score: unit vectors of queries and gallery -> figures.
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
    """A figure that is a mean over queries.

    Args:
      values: one a query; NaN where it has nothing to find.
      groups: class of each query, drawn as a whole by the bootstrap.
    """
    scored = ~np.isnan(values)
    units = np.arange(len(values)) if groups is None else groups
    several = len(np.unique(units[scored])) > 1
    interval = statistics.bootstrap(values, groups) if several else None
    return Figure(part, name, scored_mean(values), interval, int(scored.sum()))


def image_set(
    files: Sequence[Path | str], ids: Sequence[str], labels: Int64[np.ndarray, "n"] | None = None
) -> ImageSet:
    """Files as an image set; without labels where nothing depends on them."""
    none = np.zeros(len(ids), np.int64)
    labels = none if labels is None else labels
    return ImageSet(Files(map(str, files)), labels, tuple(ids), none.astype(bool))
