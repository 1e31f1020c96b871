"""What a re-ranker is, and the neighbours that all of them start from."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int64

from afa.retrieval import exact

# queries (unit vectors), exclude (row of each query that is the query itself, -1: none) -> score of
# every gallery row, higher is better. The row that is excluded may get any score.
Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]

# gallery (unit vectors), parameters -> what answers over it.
Reranker = Callable[..., Scorer]


def neighbours(
    queries: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "n d"],
    k: int,
    exclude: Int64[np.ndarray, "q"] | None = None,
) -> tuple[Float32[np.ndarray, "q j"], Int64[np.ndarray, "q j"]]:
    """Similarities and rows of the k nearest, or of all there are when they are fewer."""
    available = len(gallery) - (exclude is not None and bool(np.any(exclude >= 0)))
    return exact.topk(queries, gallery, min(k, available), exclude)


def own_neighbours(
    gallery: Float32[np.ndarray, "n d"], k: int
) -> tuple[Float32[np.ndarray, "n j"], Int64[np.ndarray, "n j"]]:
    """The same of every gallery row among the others."""
    return neighbours(gallery, gallery, k, np.arange(len(gallery)))
