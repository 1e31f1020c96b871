"""Clustering figures: how well k-means of the embeddings finds the classes again.

NMI rises with the number of clusters even for random ones; AMI takes that chance out. Both are here
because the literature of metric learning reports the first.
"""

import numpy as np
from jaxtyping import Float32, Int, Int64

from afa.errors import UserError
from afa.retrieval.exact import check_unit

ROUNDS = 100  # of Lloyd's algorithm, at most
TILE_ROWS = 16384
TABLE_ROWS = 8192  # 256 MiB of similarities


def kmeans(
    vectors: Float32[np.ndarray, "n d"], clusters: int, seed: int = 0, rounds: int = ROUNDS
) -> Int64[np.ndarray, "n"]:
    """Cluster of each unit vector: spherical k-means from k-means++ seeds (Arthur and
    Vassilvitskii 2007; Dhillon and Modha 2001), until no vector moves.

    An empty cluster takes over the vector that fits worst where it is.

    Raises:
      UserError: vectors that are not finite or not of unit length, or fewer of them than clusters.
    """
    check_unit("vectors", vectors)
    if not 1 <= clusters <= len(vectors):
        raise UserError(f"clusters={clusters} is not between 1 and {len(vectors)}, the vectors")
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
    """NMI: mutual information over the arithmetic mean of both entropies (1 if both are 0).

    Raises:
      UserError: not equally many, or none.
    """
    from sklearn.metrics import normalized_mutual_info_score  # a second: only who needs it waits

    _check_pairs(found, labels)
    return float(normalized_mutual_info_score(labels, found))


def adjusted_mutual_information(found: Int[np.ndarray, "n"], labels: Int[np.ndarray, "_"]) -> float:
    """AMI: 0 for what chance gives, 1 for equal partitions (Vinh et al. 2010, arithmetic mean).

    Raises:
      UserError: not equally many, or none.
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
        odds = far.astype(np.float64) / total if total > 0 else None  # all the same: any will do
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
        raise UserError(f"{len(found)} clustered and {len(labels)} labelled: equally many, not 0")
