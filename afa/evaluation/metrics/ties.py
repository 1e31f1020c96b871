"""Metrics averaged over every order of results that score the same (McSherry and Najork 2008).

They differ from those of `retrieval` exactly where the rule for ties decides. In a group
t + m is right with probability r/n, and then (m-1)(r-1)/(n-1) of those before it in the group are.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from afa.evaluation.metrics.retrieval import check_finite


@dataclass(frozen=True)
class Tied:
    """What stands at each place of each list, on average over the orders of equal scores.

    Attributes:
      right: (q, n) probability that the result is right.
      gained: (q, n) mean of the precision up to there where it is right, and of 0 where not.
      missed: (q, n) probability that neither it nor any result before it is right.
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
        """From the similarity of every query to the gallery, or to its most similar part.

        Args:
          junk: results that leave the list; its end is then filled with results that are wrong.

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
        """How often any positive stands in the first k."""
        return self._blank(1 - self.missed[:, k - 1])

    def precision_at_k(self, k: int) -> Float64[np.ndarray, "q"]:
        """P_k."""
        return self._blank(self.right[:, :k].sum(axis=1) / k)

    def r_precision(self) -> Float64[np.ndarray, "q"]:
        """P_R."""
        return self._over_relevant(np.where(self._first(), self.right, 0.0))

    def map_at_r(self) -> Float64[np.ndarray, "q"]:
        """MAP@R of each query."""
        return self._over_relevant(np.where(self._first(), self.gained, 0.0))

    def average_precision(self) -> Float64[np.ndarray, "q"]:
        """AP over the whole list."""
        return self._over_relevant(self.gained)

    def _first(self) -> Bool[np.ndarray, "q n"]:
        return np.arange(self.right.shape[1]) < self.relevant[:, None]

    def _over_relevant(self, table: Float64[np.ndarray, "q n"]) -> Float64[np.ndarray, "q"]:
        return self._blank(table.sum(axis=1) / np.maximum(self.relevant, 1))

    def _blank(self, values: Float64[np.ndarray, "q"]) -> Float64[np.ndarray, "q"]:
        """No value for a query without positives."""
        return np.where(self.relevant > 0, values, np.nan)


def _row(
    scores: Float[np.ndarray, "m"], positives: Bool[np.ndarray, "m"], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One list: probability to be right, precision gained, and probability that all is missed."""
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], positives[order]
    begins = np.concatenate([[True], scores[1:] != scores[:-1]])[: len(scores)]
    group = np.cumsum(begins) - 1
    size = np.bincount(group)[group]
    good = np.bincount(group, weights=right)[group]
    start = np.flatnonzero(begins)[group]
    before = (np.cumsum(right) - right)[start]
    place = np.arange(len(scores))
    inside = place - start  # results of the group before this one
    chance = good / size
    among = inside * (good - 1) / np.maximum(size - 1, 1)
    gained = chance * (before + 1 + among) / (place + 1)
    missed = np.cumprod(np.maximum(size - good - inside, 0) / (size - inside))
    rest = length - len(scores)
    last = missed[-1] if len(missed) else 1.0
    return (
        np.pad(chance, (0, rest)),
        np.pad(gained, (0, rest)),
        np.pad(missed, (0, rest), constant_values=last),
    )
