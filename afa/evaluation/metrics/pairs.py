"""Verification metrics: do two images show the same object?

The n²/2 pairs of n images do not fit into memory, so they are counted in a histogram of similarity,
tile by tile. Pairs in one bin count as ties. `PairCounts.resolution` bounds the error of the AUROC;
thresholds lie on the edges of bins.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from afa.errors import UserError
from afa.evaluation.metrics.retrieval import check_finite
from afa.retrieval.exact import check_unit

BINS = 1 << 16  # over similarities from -1 to 1; a bin is 3e-5 wide
TILE_ROWS = 2048


@dataclass(frozen=True)
class PairCounts:
    """Histograms of the similarity of positive and negative pairs.

    Attributes:
      same: (bins,) number of positive pairs (one object), by ascending similarity.
      different: (bins,) number of negative pairs (two objects).
      edges: (bins + 1,) edges of the bins.

    Raises:
      UserError: no positive or no negative pairs.
    """

    same: Int64[np.ndarray, "b"]
    different: Int64[np.ndarray, "b"]
    edges: Float[np.ndarray, "b1"]

    def __post_init__(self) -> None:
        if not self.same.sum() or not self.different.sum():
            raise UserError(
                f"{self.same.sum()} positive and {self.different.sum()} negative pairs: at least"
                " one of each is needed"
            )

    @property
    def resolution(self) -> float:
        """Largest error of the AUROC caused by counting pairs within a bin as ties."""
        tied = self.same.astype(np.float64) @ self.different
        return float(tied / 2 / self.same.sum() / self.different.sum())


def count_pairs(
    vectors: Float32[np.ndarray, "n d"], labels: Int[np.ndarray, "_"], bins: int = BINS
) -> PairCounts:
    """Counts the cosine similarities of all pairs of different images.

    Args:
      vectors: unit vectors.
      labels: class of each vector.
      bins: number of bins.

    Raises:
      UserError: vectors that are not finite or not of unit length, arguments of different lengths,
        or no positive or no negative pairs.
    """
    _check(vectors, labels)
    counts = np.zeros((2, bins), np.int64)
    for begin in range(0, len(vectors), TILE_ROWS):
        rows = slice(begin, begin + TILE_ROWS)
        scores = vectors[rows] @ vectors[begin:].T
        same = labels[rows, None] == labels[None, begin:]
        later = np.arange(scores.shape[1])[None] > np.arange(len(scores))[:, None]
        _count(counts, scores[later], same[later])
    return PairCounts(counts[0], counts[1], np.linspace(-1, 1, bins + 1))


def count_pairs_between(
    queries: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "n d"],
    query_labels: Int[np.ndarray, "_"],
    gallery_labels: Int[np.ndarray, "_"],
    bins: int = BINS,
) -> PairCounts:
    """Counts the cosine similarities of all pairs of a query and a gallery image.

    Raises:
      UserError: as `count_pairs`.
    """
    _check(queries, query_labels)
    _check(gallery, gallery_labels)
    counts = np.zeros((2, bins), np.int64)
    for first in range(0, len(queries), TILE_ROWS):
        for second in range(0, len(gallery), TILE_ROWS):
            rows, columns = slice(first, first + TILE_ROWS), slice(second, second + TILE_ROWS)
            scores = queries[rows] @ gallery[columns].T
            same = query_labels[rows, None] == gallery_labels[None, columns]
            _count(counts, scores.ravel(), same.ravel())
    return PairCounts(counts[0], counts[1], np.linspace(-1, 1, bins + 1))


def _check(vectors: Float32[np.ndarray, "n d"], labels: Int[np.ndarray, "_"]) -> None:
    check_unit("vectors", vectors)
    if len(labels) != len(vectors):
        raise UserError(f"labels has {len(labels)} entries for {len(vectors)} vectors")


def _count(
    counts: Int64[np.ndarray, "2 b"], scores: Float32[np.ndarray, "p"], same: Bool[np.ndarray, "p"]
) -> None:
    """Adds pairs to the histogram of positive (row 0) or negative pairs (row 1), in place."""
    bins = counts.shape[1]
    indices = np.clip(((scores + 1) * (bins / 2)).astype(np.int64), 0, bins - 1)
    for kind, chosen in enumerate((same, ~same)):
        counts[kind] += np.bincount(indices[chosen], minlength=bins)


def counted(scores: Float[np.ndarray, "n"], same: Bool[np.ndarray, "n"]) -> PairCounts:
    """Counts a list of scored pairs exactly: every distinct score is a bin.

    Args:
      scores: similarity of each pair.
      same: whether the pair is positive.

    Raises:
      UserError: a score is NaN or infinite, or no positive or no negative pairs.
    """
    check_finite("scores", scores)
    values, index = np.unique(scores, return_inverse=True)
    found = [np.bincount(index[each], minlength=len(values)) for each in (same, ~same)]
    return PairCounts(found[0], found[1], np.append(values, values[-1:]))


def auroc(pairs: PairCounts) -> float:
    """Probability that a positive pair scores higher than a negative pair; ties count half."""
    below = np.cumsum(pairs.different) - pairs.different
    won = pairs.same.astype(np.float64) @ (below + pairs.different / 2)
    return float(won / pairs.same.sum() / pairs.different.sum())


def fnmr_at_fmr(pairs: PairCounts, false_match_rate: float) -> tuple[float, float]:
    """False non-match rate at the lowest threshold whose false match rate is at most the given one.

    A pair matches if its score is at or above the threshold (ISO/IEC 19795-1).

    Returns:
      The false non-match rate, and the threshold: infinity if no score is high enough.

    Raises:
      UserError: the rate is not between 0 and 1, or there are too few negative pairs to measure it
        (fewer than one may match).
    """
    total = int(pairs.different.sum())
    if not 0 < false_match_rate < 1:
        raise UserError(f"false_match_rate={false_match_rate} must lie between 0 and 1")
    if false_match_rate * total < 1:
        raise UserError(
            f"false_match_rate={false_match_rate} cannot be measured with {total} negative pairs:"
            f" at least {int(np.ceil(1 / false_match_rate))} are needed"
        )
    matched = np.cumsum(pairs.different[::-1])[::-1]  # at or above each bin
    allowed = np.flatnonzero(matched <= false_match_rate * total)
    if not len(allowed):
        return 1.0, float("inf")
    threshold = int(allowed[0])
    missed = pairs.same[:threshold].sum()
    return float(missed / pairs.same.sum()), float(pairs.edges[threshold])
