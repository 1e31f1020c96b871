"""Diffusion: similarity that flows along the gallery's own neighbourhoods.

Iscen et al. 2017 ("Efficient Diffusion on Region Manifolds", section 3): with W the affinities of
mutual neighbours and S = D^-1/2 W D^-1/2, the ranking of a query y is the f that solves
(I - alpha S) f = (1 - alpha) y, found by conjugate gradients.
"""

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy import sparse

from afa.retrieval.rerank.contract import Scorer, neighbours, own_neighbours

ROUNDS = 50  # of conjugate gradients, at most; alpha = 0.99 needs about 20
TOLERANCE = 1e-6
UNREACHED = 1e-6  # weight of plain similarity: it orders only what the flow leaves equal


def diffuse(
    gallery: Float32[np.ndarray, "n d"],
    *,
    graph: int,
    results: int,
    alpha: float = 0.99,
    gamma: float = 3.0,
) -> Scorer:
    """Ranks by what arrives when the query's results pass on their scores.

    Args:
      gallery: unit vectors.
      graph: neighbours of every gallery row that the graph may join it with.
      results: rows at which the query enters the graph.
      alpha: share that is passed on.
      gamma: exponent of affinities, max(similarity, 0)^gamma.
    """
    matrix = alpha * normalised_graph(gallery, graph, gamma)

    def score(
        queries: Float32[np.ndarray, "q d"], exclude: Int64[np.ndarray, "q"]
    ) -> Float32[np.ndarray, "q n"]:
        similarity, rows = neighbours(queries, gallery, results, exclude)
        sources = np.zeros((len(gallery), len(queries)))
        columns = np.arange(len(queries))[:, None]
        sources[rows, columns] = np.maximum(similarity, 0).astype(np.float64) ** gamma
        flow = solve(matrix, (1 - alpha) * sources).T
        largest = np.maximum(flow.max(axis=1, keepdims=True), 1e-12)
        return (flow / largest + UNREACHED * (queries @ gallery.T)).astype(np.float32)

    return score


def normalised_graph(
    gallery: Float32[np.ndarray, "n d"], graph: int, gamma: float
) -> sparse.csr_array:
    """S: affinities of rows that are among each other's neighbours, scaled by both degrees."""
    similarity, rows = own_neighbours(gallery, graph)
    count = len(gallery)
    begins = np.arange(0, rows.size + 1, rows.shape[1])
    weights = np.maximum(similarity, 0).astype(np.float64) ** gamma
    directed = sparse.csr_array((weights.ravel(), rows.ravel(), begins), (count, count))
    mutual = directed.minimum(directed.T)
    degree = np.asarray(mutual.sum(axis=1)).ravel()
    scale = sparse.diags_array(1 / np.sqrt(np.maximum(degree, 1e-12)))
    return sparse.csr_array(scale @ mutual @ scale)


def solve(
    matrix: sparse.csr_array, right: Float64[np.ndarray, "n q"]
) -> Float64[np.ndarray, "n q"]:
    """x with x - matrix x = right, every column by itself: conjugate gradients."""
    found = np.zeros_like(right)
    rest, step = right.copy(), right.copy()
    size = np.einsum("nq,nq->q", rest, rest)
    enough = TOLERANCE**2 * np.maximum(size, 1e-300)
    for _ in range(ROUNDS):
        if np.all(size <= enough):
            break
        pushed = step - matrix @ step
        length = size / np.maximum(np.einsum("nq,nq->q", step, pushed), 1e-300)
        found += length * step
        rest -= length * pushed
        before, size = size, np.einsum("nq,nq->q", rest, rest)
        step = rest + (size / np.maximum(before, 1e-300)) * step
    return found
