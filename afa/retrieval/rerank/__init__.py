"""Better rankings: the table of re-rankers, and the settings among which validation chooses."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from afa.retrieval.rerank.contract import ImageReranker, Reranker, Scorer
from afa.retrieval.rerank.diffusion import diffuse
from afa.retrieval.rerank.expansion import both, database_augmentation, query_expansion
from afa.retrieval.rerank.geometry import geometric_verification, local_matches
from afa.retrieval.rerank.posterior import class_agreement
from afa.retrieval.rerank.reciprocal import k_reciprocal


def word(name: str) -> str:
    """A method's name as it is typed: `k_reciprocal` for `k-reciprocal`."""
    return name.lower().replace(" ", "_").replace("-", "_")


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


@dataclass(frozen=True)
class Method:
    """A re-ranker and the values of each of its settings that are tried."""

    reranker: Reranker
    grid: Mapping[str, Sequence[Any]]

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the grid."""
        return combinations(self.grid)


@dataclass(frozen=True)
class Evidence:
    """What is added to the similarity: the evidence, times a weight.

    Attributes:
      reranker: gallery, settings -> evidence for every gallery row, 0 where there is none.
      weights: values of the weight that are tried.
    """

    reranker: ImageReranker
    grid: Mapping[str, Sequence[Any]]
    weights: Sequence[float]

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the grid, the weight apart."""
        return combinations(self.grid)


def plain(gallery: np.ndarray) -> Scorer:
    """The similarity itself: what all others are measured against."""
    return lambda queries, exclude: queries @ gallery.T


RESULTS = (1, 2, 4, 8)

METHODS: dict[str, Method] = {
    "plain": Method(plain, {}),
    "average query expansion": Method(query_expansion, {"results": RESULTS}),
    "alpha query expansion": Method(query_expansion, {"results": RESULTS, "alpha": (1.0, 3.0)}),
    "database augmentation": Method(
        database_augmentation, {"results": RESULTS, "alpha": (1.0, 3.0)}
    ),
    "expansion and augmentation": Method(both, {"results": RESULTS, "alpha": (1.0, 3.0)}),
    "k-reciprocal": Method(k_reciprocal, {"k1": (10, 20), "k2": (1, 4), "plain": (0.3, 0.7)}),
    "diffusion": Method(diffuse, {"graph": (10, 20), "results": (3, 10), "alpha": (0.9, 0.99)}),
}

WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
LOCAL_SCALES = (1.0, 2.0)  # the local view of a larger image has more and finer places

EVIDENCE: dict[str, Evidence] = {
    "class posterior": Evidence(class_agreement, {}, (0.03, 0.1, 0.3, 1.0)),
    "local matches": Evidence(local_matches, {"scale": LOCAL_SCALES}, WEIGHTS),
    "geometric verification": Evidence(
        geometric_verification, {"scale": LOCAL_SCALES, "tolerance": (0.1, 0.25)}, WEIGHTS
    ),
}
