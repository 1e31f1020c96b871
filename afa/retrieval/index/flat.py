"""Comparing with every row in NumPy: for few rows, few queries, and whatever a filter leaves.

Slower than `afa.retrieval.exact` on many queries, but there is nothing to compile and nothing to
bring to a device.
"""

import numpy as np
from jaxtyping import Bool, Float32, Int64

from afa.retrieval.exact import PADDING

PAIRS = 2**24  # similarities that are held at a time


def topk(
    queries: Float32[np.ndarray, "q d"],
    vectors: Float32[np.ndarray, "n d"],
    k: int,
    allowed: Bool[np.ndarray, "n"] | None = None,
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """The k most similar rows of each query; -1 and -inf where fewer are allowed. Equal
    similarities rank by row."""
    rows = np.full((len(queries), k), PADDING, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    offered = None if allowed is None else np.flatnonzero(allowed)
    shown = vectors if offered is None else vectors[offered]
    kept = min(k, len(shown))
    step = max(1, PAIRS // max(1, len(shown)))
    for begin in range(0, len(queries) if kept else 0, step):
        block = slice(begin, begin + step)
        similarity = queries[block] @ shown.T
        for i, line in enumerate(similarity, start=begin):
            best = _best(line, kept)
            rows[i, :kept] = best if offered is None else offered[best]
            scores[i, :kept] = line[best]
    return rows, scores


def within(
    query: Float32[np.ndarray, "d"],
    vectors: Float32[np.ndarray, "n d"],
    score: float,
    allowed: Bool[np.ndarray, "n"] | None = None,
) -> tuple[Int64[np.ndarray, "_"], Float32[np.ndarray, "_"]]:
    """Rows at least this similar, best first."""
    similarity = vectors @ query
    near = similarity >= score
    rows = np.flatnonzero(near if allowed is None else near & allowed)
    order = np.argsort(-similarity[rows], kind="stable")
    return rows[order], similarity[rows[order]]


def merged(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """The k best of two lists of results (rows, scores) of the same queries."""
    rows, scores = (np.concatenate(pair, axis=1) for pair in zip(one, other, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _best(similarity: Float32[np.ndarray, "n"], k: int) -> Int64[np.ndarray, "k"]:
    if k == len(similarity):
        return np.argsort(-similarity, kind="stable")
    least = np.partition(similarity, len(similarity) - k)[len(similarity) - k]
    near = np.flatnonzero(similarity >= least)  # more than k only where similarities are equal
    return near[np.argsort(-similarity[near], kind="stable")][:k]
