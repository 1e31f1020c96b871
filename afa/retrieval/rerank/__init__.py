"""Better rankings: the table of re-rankers, and the settings among which validation chooses."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from afa.retrieval.rerank.contract import Reranker, Scorer
from afa.retrieval.rerank.diffusion import diffuse
from afa.retrieval.rerank.expansion import both, database_augmentation, query_expansion
from afa.retrieval.rerank.reciprocal import k_reciprocal


@dataclass(frozen=True)
class Method:
    """A re-ranker and the values of each of its settings that are tried."""

    reranker: Reranker
    grid: Mapping[str, Sequence[Any]]

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the grid."""
        return [
            dict(zip(self.grid, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]


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
