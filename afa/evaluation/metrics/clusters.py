"""Clustering metrics: agreement of k-means clusters of the embeddings with the classes.

NMI grows with the number of clusters even for random clusters; AMI is corrected for chance. NMI is
kept because the metric learning literature reports it.
"""

import numpy as np
from jaxtyping import Float32, Int, Int64
from scipy.sparse import coo_array
from scipy.special import gammaln

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
    counts = _contingency(found, labels)
    mean = (_entropy(counts.sum(0)) + _entropy(counts.sum(1))) / 2
    return _mutual_information(counts) / mean if mean > 0 else 1.0


def adjusted_mutual_information(found: Int[np.ndarray, "n"], labels: Int[np.ndarray, "_"]) -> float:
    """AMI: mutual information corrected for chance, 0 for random clusters and 1 for equal ones.

    Normalised by the arithmetic mean of both entropies (Vinh et al. 2010, JMLR 11). Arguments and
    errors as in `normalised_mutual_information`.
    """
    counts = _contingency(found, labels)
    sizes = counts.sum(0), counts.sum(1)
    if counts.nnz == len(sizes[0]) == len(sizes[1]):
        return 1.0  # equal partitions; the quotient below may be 0 / 0
    expected = _expected_mutual_information(*sizes)
    mean = (_entropy(sizes[0]) + _entropy(sizes[1])) / 2
    return (_mutual_information(counts) - expected) / (mean - expected)


def _contingency(found: Int[np.ndarray, "n"], labels: Int[np.ndarray, "_"]) -> coo_array:
    # The number of vectors of each pair of class and cluster; pairs without a vector are absent.
    _check_pairs(found, labels)
    columns, rows = (np.unique(each, return_inverse=True)[1] for each in (found, labels))
    counts = coo_array((np.ones(len(rows), np.int64), (rows, columns)))
    counts.sum_duplicates()
    return counts


def _entropy(sizes: Int[np.ndarray, "_"]) -> float:
    shares = sizes / sizes.sum()
    return float(-(shares * np.log(shares)).sum())


def _mutual_information(counts: coo_array) -> float:
    joint = counts.data / counts.sum()
    columns, rows = counts.sum(0), counts.sum(1)
    independent = rows[counts.row] / rows.sum() * (columns[counts.col] / columns.sum())
    return max(float((joint * np.log(joint / independent)).sum()), 0.0)


def _expected_mutual_information(a: Int[np.ndarray, "r"], b: Int[np.ndarray, "c"]) -> float:
    # Vinh et al. 2010, equation 24a: the hypergeometric model. The terms depend on the sizes alone,
    # so each pair of sizes is computed once, whatever the number of classes and clusters.
    n = int(a.sum())
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    total = 0.0
    for size, times in zip(*np.unique(a, return_counts=True), strict=True):
        for other, others in zip(*np.unique(b, return_counts=True), strict=True):
            both = np.arange(max(1, size + other - n), min(size, other) + 1)
            log_odds = (
                log_factorial[size] + log_factorial[other]
                + log_factorial[n - size] + log_factorial[n - other]
                - log_factorial[n] - log_factorial[both]
                - log_factorial[size - both] - log_factorial[other - both]
                - log_factorial[n - size - other + both]
            )  # fmt: skip
            terms = both / n * np.log(n * both / (size * other)) * np.exp(log_odds)
            total += float(terms.sum()) * int(times) * int(others)
    return total


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
