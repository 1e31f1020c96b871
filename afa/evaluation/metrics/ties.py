"""Retrieval metrics averaged over all orders of tied results (McSherry and Najork 2008).

They differ from those of `afa.evaluation.metrics.retrieval` only where scores are equal. In a group
of n tied results with r positives, each result is a positive with probability r/n. Given
that the m-th of the group is one, (m-1)(r-1)/(n-1) of those before it in the group are expected to
be positives.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from afa.evaluation.metrics.retrieval import check_finite


@dataclass(frozen=True)
class Tied:
    """Expectations at each rank of each list, over all orders of tied results.

    Attributes:
      right: (q, n) probability that the result is a positive.
      gained: (q, n) expected precision at the result if it is a positive, else 0.
      missed: (q, n) probability that neither it nor any result before it is a positive.
      relevant: (q,) R, the number of positives.
    """

    right: Float64[np.ndarray, "q n"]
    gained: Float64[np.ndarray, "q n"]
    missed: Float64[np.ndarray, "q n"]
    relevant: Int[np.ndarray, "q"]

    @classmethod
    def from_scores(
        cls,
        scores: Float[np.ndarray, "q n"],
        positives: Bool[np.ndarray, "q n"],
        junk: Bool[np.ndarray, "q n"] | None = None,
    ) -> "Tied":
        """Ranks the gallery, or the most similar part of it, by score.

        Args:
          scores: similarity of every query to every gallery row.
          positives: whether the row is a positive of the query.
          junk: whether the row is removed from the ranking; the list is padded with negatives.

        Raises:
          UserError: a score is NaN or infinite.
        """
        check_finite("scores", scores)
        skipped = np.zeros_like(positives) if junk is None else junk
        rows = [
            _row(line[~out], right[~out], len(line))
            for line, right, out in zip(scores, positives, skipped, strict=True)
        ]
        tables = [np.stack(part) for part in zip(*rows, strict=True)]
        return cls(*tables, relevant=(positives & ~skipped).sum(axis=1))

    def recall_at_k(self, k: int) -> Float64[np.ndarray, "q"]:
        """Probability that a positive is among the first k results."""
        return self._blank(1 - self.missed[:, k - 1])

    def precision_at_k(self, k: int) -> Float64[np.ndarray, "q"]:
        """Expected precision of the first k results."""
        return self._blank(self.right[:, :k].sum(axis=1) / k)

    def r_precision(self) -> Float64[np.ndarray, "q"]:
        """Expected precision of the first R results."""
        return self._over_relevant(np.where(self._first(), self.right, 0.0))

    def map_at_r(self) -> Float64[np.ndarray, "q"]:
        """Expected MAP@R of each query."""
        return self._over_relevant(np.where(self._first(), self.gained, 0.0))

    def average_precision(self) -> Float64[np.ndarray, "q"]:
        """Expected average precision over the whole list."""
        return self._over_relevant(self.gained)

    def _first(self) -> Bool[np.ndarray, "q n"]:
        return np.arange(self.right.shape[1]) < self.relevant[:, None]

    def _over_relevant(self, table: Float64[np.ndarray, "q n"]) -> Float64[np.ndarray, "q"]:
        return self._blank(table.sum(axis=1) / np.maximum(self.relevant, 1))

    def _blank(self, values: Float64[np.ndarray, "q"]) -> Float64[np.ndarray, "q"]:
        """Sets the value of queries without positives to NaN."""
        return np.where(self.relevant > 0, values, np.nan)


def _row(
    scores: Float[np.ndarray, "m"], positives: Bool[np.ndarray, "m"], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes `right`, `gained` and `missed` of one list."""
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], positives[order]
    begins = np.concatenate([[True], scores[1:] != scores[:-1]])[: len(scores)]
    group = np.cumsum(begins) - 1
    size = np.bincount(group)[group]
    good = np.bincount(group, weights=right)[group]
    start = np.flatnonzero(begins)[group]
    before = (np.cumsum(right) - right)[start]
    rank = np.arange(len(scores))
    inside = rank - start  # results of the group before this one
    chance = good / size
    among = inside * (good - 1) / np.maximum(size - 1, 1)
    gained = chance * (before + 1 + among) / (rank + 1)
    missed = np.cumprod(np.maximum(size - good - inside, 0) / (size - inside))
    rest = length - len(scores)
    last = missed[-1] if len(missed) else 1.0
    return (
        np.pad(chance, (0, rest)),
        np.pad(gained, (0, rest)),
        np.pad(missed, (0, rest), constant_values=last),
    )
