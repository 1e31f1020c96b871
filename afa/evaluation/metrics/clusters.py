"""Clustering metrics: agreement of k-means clusters of the embeddings with the classes.

NMI grows with the number of clusters even for random clusters; AMI is corrected for chance. NMI is
kept because the metric learning literature reports it.
"""

import numpy as np
from jaxtyping import Float32, Int, Int64

from afa.errors import UserError
from afa.retrieval.exact import check_unit

ROUNDS = 100  # most iterations of Lloyd's algorithm
TILE_ROWS = 16384
TABLE_ROWS = 8192  # 256 MiB of similarities


def kmeans(
    vectors: Float32[np.ndarray, "n d"], clusters: int, seed: int = 0, rounds: int = ROUNDS
) -> Int64[np.ndarray, "n"]:
    """Clusters unit vectors by spherical k-means with k-means++ initialisation.

    Runs until no assignment changes. An empty cluster receives the vector that is least similar to
    its own centre (Dhillon and Modha 2001; Arthur and Vassilvitskii 2007).

    Args:
      vectors: unit vectors.
      clusters: number of clusters.
      seed: seed of the initialisation.
      rounds: most iterations.

    Returns:
      Cluster of each vector, from 0.

    Raises:
      UserError: vectors that are not finite or not of unit length, or fewer vectors than clusters.
    """
    check_unit("vectors", vectors)
    if not 1 <= clusters <= len(vectors):
        raise UserError(
            f"clusters={clusters} must lie between 1 and {len(vectors)}, the number of vectors"
        )
    centres = _seeds(vectors, clusters, np.random.default_rng(seed))
    before = np.full(len(vectors), -1)
    for _ in range(rounds):
        found, fit = _nearest(vectors, centres)
        sizes = np.bincount(found, minlength=clusters)
        for empty in np.flatnonzero(sizes == 0):
            worst = int(np.where(sizes[found] > 1, fit, np.inf).argmin())
            sizes[found[worst]] -= 1
            found[worst], fit[worst], sizes[empty] = empty, np.inf, 1
        if np.array_equal(found, before):
            break
        before = found
        order = np.argsort(found, kind="stable")
        starts = np.searchsorted(found[order], np.arange(clusters))
        sums = np.add.reduceat(vectors[order], starts, axis=0)
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return before


def normalised_mutual_information(
    found: Int[np.ndarray, "n"], labels: Int[np.ndarray, "_"]
) -> float:
    """NMI: mutual information divided by the arithmetic mean of both entropies (1 if both are 0).

    Args:
      found: cluster of each vector.
      labels: class of each vector.

    Raises:
      UserError: different numbers of entries, or none.
    """
    from sklearn.metrics import normalized_mutual_info_score  # slow import, needed here alone

    _check_pairs(found, labels)
    return float(normalized_mutual_info_score(labels, found))


def adjusted_mutual_information(found: Int[np.ndarray, "n"], labels: Int[np.ndarray, "_"]) -> float:
    """AMI: mutual information corrected for chance, 0 for random clusters and 1 for equal ones.

    Normalised by the arithmetic mean of both entropies (Vinh et al. 2010). Arguments and errors as
    in `normalised_mutual_information`.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    _check_pairs(found, labels)
    return float(adjusted_mutual_info_score(labels, found))


def _seeds(
    vectors: Float32[np.ndarray, "n d"], clusters: int, draw: np.random.Generator
) -> Float32[np.ndarray, "k d"]:
    # One large product is many times faster than a small one for each seed.
    table = vectors @ vectors.T if len(vectors) <= TABLE_ROWS else None

    def distances(to: int) -> Float32[np.ndarray, "n"]:
        near = vectors @ vectors[to] if table is None else table[to]
        return np.maximum(1 - near, 0)

    chosen = [int(draw.integers(len(vectors)))]
    far = distances(chosen[0])
    for _ in range(1, clusters):
        total = float(far.sum(dtype=np.float64))
        odds = far.astype(np.float64) / total if total > 0 else None  # None: uniform
        chosen.append(int(draw.choice(len(vectors), p=odds)))
        far = np.minimum(far, distances(chosen[-1]))
    return vectors[chosen]


def _nearest(
    vectors: Float32[np.ndarray, "n d"], centres: Float32[np.ndarray, "k d"]
) -> tuple[Int64[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    found, fit = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    for begin in range(0, len(vectors), TILE_ROWS):
        rows = slice(begin, begin + TILE_ROWS)
        scores = vectors[rows] @ centres.T
        found[rows], fit[rows] = scores.argmax(axis=1), scores.max(axis=1)
    return found, fit


def _check_pairs(found: Int[np.ndarray, "n"], labels: Int[np.ndarray, "_"]) -> None:
    if len(found) != len(labels) or not len(found):
        raise UserError(
            f"{len(found)} clusters for {len(labels)} labels: both need the same length, at least 1"
        )
