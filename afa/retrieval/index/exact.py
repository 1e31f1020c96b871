"""`exact://`: exact search on the devices (`afa.retrieval.exact`)."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from afa import parallel
from afa.errors import UserError
from afa.retrieval import exact
from afa.retrieval.index import flat
from afa.retrieval.index.local import Allowed, Builder, Engine, InProcess, RangeResults, TopK
from afa.retrieval.index.uri import Address

OPTIONS = {"recall": float}
SMALL = 2**22  # similarities up to which NumPy is as fast, and needs no compilation


class ExactEngine(Engine):
    """Compares queries with every row.

    Args:
      vectors: unit vectors.
      recall: below 1, accelerators use `approx_max_k` (Chern et al. 2022, "TPU-KNN"), which finds
        this share of the best in expectation; CPUs find all.
    """

    def __init__(self, vectors: Float32[np.ndarray, "n d"], recall: float = 1.0) -> None:
        self._vectors, self._recall = vectors, recall
        self._gallery: exact.Gallery | None = None

    def search(self, queries: Float32[np.ndarray, "q d"], k: int, allowed: Allowed) -> TopK:
        small = len(queries) * len(self._vectors) <= SMALL and not parallel.accelerated()
        if small:
            return flat.topk(queries, self._vectors, k, allowed)
        if self._gallery is None:
            self._gallery = exact.Gallery(self._vectors)
        scores, rows = exact.topk(queries, self._gallery, k, allowed=allowed, recall=self._recall)
        return rows, scores

    def within(
        self, queries: Float32[np.ndarray, "q d"], score: float, allowed: Allowed
    ) -> list[RangeResults]:
        return [flat.within(query, self._vectors, score, allowed) for query in queries]

    def info(self) -> dict[str, Any]:
        return {"kind": "exact", "recall": self._recall}

    def write(self, stage: Path) -> dict[str, Any]:
        return {}


def options(address: Address) -> dict[str, Any]:
    """Returns the options of an address.

    Raises:
      UserError: an unknown option, a location, or a recall outside of (0, 1].
    """
    if address.location:
        raise UserError(f"{address.text!r}: exact:// takes no location, only options after ?")
    values = address.read(OPTIONS)
    if not 0 < values.get("recall", 1.0) <= 1:
        raise UserError(f"{address.text!r}: recall={values['recall']} must lie in (0, 1]")
    return values


def _builder(address: Address, info: dict[str, Any] | None) -> Builder:
    values = options(address)
    return lambda vectors: ExactEngine(vectors, **values)


ENGINE = InProcess(options, _builder)
