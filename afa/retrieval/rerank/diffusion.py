"""Diffusion on the neighbourhood graph of the gallery.

Iscen et al. 2017 ("Efficient Diffusion on Region Manifolds", section 3): with the affinity matrix W
of mutual neighbours and S = D^-1/2 W D^-1/2, the scores f of a query y solve
(I - alpha S) f = (1 - alpha) y. The system is solved by conjugate gradients.
"""

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy import sparse

from afa.retrieval.rerank.contract import Scorer, neighbours, own_neighbours

ROUNDS = 50  # most iterations of conjugate gradients; alpha = 0.99 needs about 20
TOLERANCE = 1e-6
UNREACHED = 1e-6  # weight of the similarity, which orders rows with equal diffusion scores


def diffuse(
    gallery: Float32[np.ndarray, "n d"],
    *,
    graph: int,
    results: int,
    alpha: float = 0.99,
    gamma: float = 3.0,
) -> Scorer:
    """Ranks by diffusion from the query's nearest neighbours.

    Args:
      gallery: unit vectors.
      graph: neighbours of every gallery row in the graph, before mutual ones are selected.
      results: nearest neighbours of the query at which diffusion starts.
      alpha: weight of the graph.
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
    """Returns S: affinities of mutual neighbours, normalised by the degrees of both.

    Arguments as in `diffuse`.
    """
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
    """Solves x - matrix x = right for every column by conjugate gradients.

    Args:
      matrix: symmetric, eigenvalues below 1.
      right: one right-hand side per column.
    """
    solution = np.zeros_like(right)
    residual, direction = right.copy(), right.copy()
    size = np.einsum("nq,nq->q", residual, residual)
    enough = TOLERANCE**2 * np.maximum(size, 1e-300)
    for _ in range(ROUNDS):
        if np.all(size <= enough):
            break
        product = direction - matrix @ direction
        length = size / np.maximum(np.einsum("nq,nq->q", direction, product), 1e-300)
        solution += length * direction
        residual -= length * product
        before, size = size, np.einsum("nq,nq->q", residual, residual)
        direction = residual + (size / np.maximum(before, 1e-300)) * direction
    return solution
