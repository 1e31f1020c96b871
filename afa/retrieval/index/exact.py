"""`exact://`: compares with every row, on the devices (`afa.retrieval.exact`)."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from afa import parallel
from afa.errors import UserError
from afa.retrieval import exact
from afa.retrieval.index import flat
from afa.retrieval.index.local import Allowed, Engine, Found, Near
from afa.retrieval.index.uri import Address

OPTIONS = {"recall": float}
FEW = 2**22  # similarities; below, NumPy is as fast and has nothing to compile


class ExactEngine(Engine):
    """Compares with every row.

    Args:
      vectors: unit vectors.
      recall: below 1, accelerators look for the best with `approx_max_k` (Chern et al. 2022, "TPU-
        KNN"), which finds this share of them in expectation; a CPU finds all.
    """

    def __init__(self, vectors: Float32[np.ndarray, "n d"], recall: float = 1.0) -> None:
        self._vectors, self._recall = vectors, recall
        self._gallery: exact.Gallery | None = None

    def search(self, queries: Float32[np.ndarray, "q d"], k: int, allowed: Allowed) -> Found:
        small = len(queries) * len(self._vectors) <= FEW and not parallel.accelerated()
        if small:
            return flat.topk(queries, self._vectors, k, allowed)
        if self._gallery is None:
            self._gallery = exact.Gallery(self._vectors)
        scores, rows = exact.topk(queries, self._gallery, k, allowed=allowed, recall=self._recall)
        return rows, scores

    def within(
        self, queries: Float32[np.ndarray, "q d"], score: float, allowed: Allowed
    ) -> list[Near]:
        return [flat.within(query, self._vectors, score, allowed) for query in queries]

    def info(self) -> dict[str, Any]:
        return {"kind": "exact", "recall": self._recall}

    def write(self, stage: Path) -> dict[str, Any]:
        return {}


def options(address: Address) -> dict[str, Any]:
    """What an address says.

    Raises:
      UserError: an unknown option, a place (it is on this machine), or a recall outside of (0, 1].
    """
    if address.place:
        raise UserError(f"{address.text!r}: exact:// takes no place, only options behind ?")
    values = address.read(OPTIONS)
    if not 0 < values.get("recall", 1.0) <= 1:
        raise UserError(f"{address.text!r}: recall={values['recall']} must lie in (0, 1]")
    return values
