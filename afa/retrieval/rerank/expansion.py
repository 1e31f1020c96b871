"""Query expansion: a query is replaced by the mean of itself and its first results.

Chum et al. 2007 ("Total Recall") average the first n results; Radenović et al. 2019, section 3.4,
weight each by its similarity to the power of alpha (0 is the plain average). Applied to gallery
vectors it is database-side augmentation (Turcot and Lowe 2009; Arandjelović and Zisserman 2012).
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
      results: n, the number of results that are averaged.
      alpha: exponent of their weights, max(similarity, 0)^alpha; the query has weight 1.
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
    """Replaces each gallery vector by the mean of itself and its neighbours.

    Arguments as in `query_expansion`.
    """
    augmented = expanded(gallery, gallery, *own_neighbours(gallery, results), alpha)
    return lambda queries, exclude: queries @ augmented.T


def both(gallery: Float32[np.ndarray, "n d"], *, results: int, alpha: float = 0.0) -> Scorer:
    """Query expansion in an augmented gallery. Arguments as in `query_expansion`."""
    augmented = expanded(gallery, gallery, *own_neighbours(gallery, results), alpha)
    return query_expansion(augmented, results=results, alpha=alpha)


def expanded(
    vectors: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "n d"],
    similarity: Float32[np.ndarray, "q j"],
    rows: Int64[np.ndarray, "q j"],
    alpha: float,
) -> Float32[np.ndarray, "q d"]:
    """Adds the weighted sum of its neighbours to each vector and normalises the result.

    Args:
      vectors: unit vectors.
      gallery: unit vectors.
      similarity, rows: similarities and gallery rows of the neighbours of each vector.
      alpha: exponent of the weights.
    """
    weights = np.maximum(similarity, 0) ** np.float32(alpha)
    return normalise(vectors + np.einsum("qj,qjd->qd", weights, gallery[rows]))
