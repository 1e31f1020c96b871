"""Re-ranking: the table of methods and the settings that are tried on validation classes."""

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
    """Returns the name of a method as typed on the command line: `k_reciprocal`."""
    return name.lower().replace(" ", "_").replace("-", "_")


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns every combination of the values of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


@dataclass(frozen=True)
class Method:
    """A re-ranker and the values that are tried for each of its settings."""

    reranker: Reranker
    grid: Mapping[str, Sequence[Any]]

    def settings(self) -> list[dict[str, Any]]:
        """Returns every combination of the grid."""
        return combinations(self.grid)


@dataclass(frozen=True)
class Evidence:
    """A score that is added to the similarity with a weight.

    Attributes:
      reranker: gallery, settings -> score of every gallery row, 0 without evidence.
      grid: values that are tried for each setting.
      weights: weights that are tried.
    """

    reranker: ImageReranker
    grid: Mapping[str, Sequence[Any]]
    weights: Sequence[float]

    def settings(self) -> list[dict[str, Any]]:
        """Returns every combination of the grid, without the weight."""
        return combinations(self.grid)


def plain(gallery: np.ndarray) -> Scorer:
    """Ranks by cosine similarity; the baseline of all other methods."""
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
LOCAL_SCALES = (1.0, 2.0)  # a larger image has more and finer local features

EVIDENCE: dict[str, Evidence] = {
    "class posterior": Evidence(class_agreement, {}, (0.03, 0.1, 0.3, 1.0)),
    "local matches": Evidence(local_matches, {"scale": LOCAL_SCALES}, WEIGHTS),
    "geometric verification": Evidence(
        geometric_verification, {"scale": LOCAL_SCALES, "tolerance": (0.1, 0.25)}, WEIGHTS
    ),
}
