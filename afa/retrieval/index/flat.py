"""Exact search in NumPy, for few rows, few queries, and filtered galleries.

Slower than `afa.retrieval.exact` for many queries, but needs no compilation and no transfer to a
device.
"""

import numpy as np
from jaxtyping import Bool, Float32, Int64

from afa.retrieval.exact import PADDING

PAIRS = 2**24  # similarities in memory at a time


def topk(
    queries: Float32[np.ndarray, "q d"],
    vectors: Float32[np.ndarray, "n d"],
    k: int,
    allowed: Bool[np.ndarray, "n"] | None = None,
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """Returns the k most similar rows of each query and their similarities; -1 and -inf if fewer
    are allowed. Ties are ordered by row."""
    rows = np.full((len(queries), k), PADDING, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    candidates = None if allowed is None else np.flatnonzero(allowed)
    gallery = vectors if candidates is None else vectors[candidates]
    kept = min(k, len(gallery))
    step = max(1, PAIRS // max(1, len(gallery)))
    for begin in range(0, len(queries) if kept else 0, step):
        block = slice(begin, begin + step)
        similarity = queries[block] @ gallery.T
        for i, line in enumerate(similarity, start=begin):
            best = _best(line, kept)
            rows[i, :kept] = best if candidates is None else candidates[best]
            scores[i, :kept] = line[best]
    return rows, scores


def within(
    query: Float32[np.ndarray, "d"],
    vectors: Float32[np.ndarray, "n d"],
    score: float,
    allowed: Bool[np.ndarray, "n"] | None = None,
) -> tuple[Int64[np.ndarray, "_"], Float32[np.ndarray, "_"]]:
    """Returns the rows at least this similar and their similarities, best first."""
    similarity = vectors @ query
    near = similarity >= score
    rows = np.flatnonzero(near if allowed is None else near & allowed)
    order = np.argsort(-similarity[rows], kind="stable")
    return rows[order], similarity[rows[order]]


def merged(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """Merges two result lists (rows, scores) of the same queries; returns the k best."""
    rows, scores = (np.concatenate(pair, axis=1) for pair in zip(one, other, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _best(similarity: Float32[np.ndarray, "n"], k: int) -> Int64[np.ndarray, "k"]:
    if k == len(similarity):
        return np.argsort(-similarity, kind="stable")
    least = np.partition(similarity, len(similarity) - k)[len(similarity) - k]
    near = np.flatnonzero(similarity >= least)  # more than k only if similarities are equal
    return near[np.argsort(-similarity[near], kind="stable")][:k]
