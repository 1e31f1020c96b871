"""Query expansion: a query is replaced by the mean of itself and what it finds.

Chum et al. 2007 ("Total Recall") average the first n results; Radenović et al. 2019, section 3.4,
weigh each by its similarity to the power of alpha (0 is the plain average). Done to the gallery it
is database-side augmentation (Turcot and Lowe 2009; Arandjelović and Zisserman 2012).
"""

import numpy as np
from jaxtyping import Float32, Int64

from afa.retrieval.exact import normalise
from afa.retrieval.rerank.contract import Scorer, neighbours, own_neighbours


def query_expansion(
    gallery: Float32[np.ndarray, "n d"], *, results: int, alpha: float = 0.0
) -> Scorer:
    """Searches again with the mean of the query and its first results.

    Args:
      gallery: unit vectors.
      results: n, how many of them.
      alpha: exponent of their weights, max(similarity, 0)^alpha; the query's own is 1.
    """

    def score(
        queries: Float32[np.ndarray, "q d"], exclude: Int64[np.ndarray, "q"]
    ) -> Float32[np.ndarray, "q n"]:
        found = neighbours(queries, gallery, results, exclude)
        return expanded(queries, gallery, *found, alpha) @ gallery.T

    return score


def database_augmentation(
    gallery: Float32[np.ndarray, "n d"], *, results: int, alpha: float = 0.0
) -> Scorer:
    """Searches in a gallery each of whose vectors is the mean of itself and its neighbours."""
    augmented = expanded(gallery, gallery, *own_neighbours(gallery, results), alpha)
    return lambda queries, exclude: queries @ augmented.T


def both(gallery: Float32[np.ndarray, "n d"], *, results: int, alpha: float = 0.0) -> Scorer:
    """Query expansion within an augmented gallery."""
    augmented = expanded(gallery, gallery, *own_neighbours(gallery, results), alpha)
    return query_expansion(augmented, results=results, alpha=alpha)


def expanded(
    vectors: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "n d"],
    similarity: Float32[np.ndarray, "q j"],
    rows: Int64[np.ndarray, "q j"],
    alpha: float,
) -> Float32[np.ndarray, "q d"]:
    """Each vector plus the weighted sum of its neighbours, at unit length."""
    weights = np.maximum(similarity, 0) ** np.float32(alpha)
    return normalise(vectors + np.einsum("qj,qjd->qd", weights, gallery[rows]))
