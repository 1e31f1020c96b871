"""When to answer "no match": the similarity that an object the gallery does not hold may reach.

Scores mean nothing by themselves: how near the nearest image is depends on the network, the
images and the size of the gallery. So images of validation classes, which the gallery does not
hold, are searched in the very gallery that is served (classes that it does hold are taken out for
their own queries). The share of them whose best score reaches a threshold is its false match rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from afa.errors import UserError
from afa.io import file_sha256
from afa.retrieval.exact import check_unit

BLOCK = 256  # queries at a time


@dataclass(frozen=True)
class Calibration:
    """What unknown objects score.

    Attributes:
      scores: the best score of each query of an unknown object, ascending.
    """

    scores: tuple[float, ...]

    @classmethod
    def load(cls, stored: Sequence[float] | None) -> "Calibration":
        """From the manifest of an export.

        Raises:
          UserError: the export has none.
        """
        if not stored:
            raise UserError("this index was made without calibration: export and build it again")
        return cls(tuple(stored))

    def threshold(self, rate: float) -> float:
        """The lowest score that at most this share of unknown objects reach or pass.

        Raises:
          UserError: the rate is not between 0 and 1, or fewer than one query could pass.
        """
        count = len(self.scores)
        if not 0 < rate < 1:
            raise UserError(f"false_matches={rate} must lie between 0 and 1")
        allowed = math.floor(rate * count + 1e-9)
        if allowed < 1:
            raise UserError(
                f"false_matches={rate} cannot be told from {count} images of unknown objects:"
                f" the least is {1 / count:.2g}"
            )
        # Just above the best score that must not pass.
        return float(np.nextafter(np.float32(self.scores[count - allowed - 1]), np.float32(2)))


def require_apart(unknown: Sequence[Path], gallery: Sequence[Path]) -> None:
    """Refuses images of unknown objects that the gallery holds: they would score 1, and with them
    every image of the gallery would be "no match".

    Args:
      unknown, gallery: files; copies under another name count as well.

    Raises:
      UserError: naming the first of them.
    """
    sizes = {path.stat().st_size for path in gallery} & {path.stat().st_size for path in unknown}
    held = {file_sha256(path): path for path in gallery if path.stat().st_size in sizes}
    for path in unknown:
        if path.stat().st_size in sizes and (same := held.get(file_sha256(path))):
            raise UserError(
                f"--calibrate: {path} is in the gallery too ({same}); it needs images of objects "
                "that the gallery does not hold"
            )


def best_scores(
    queries: Float32[np.ndarray, "q d"],
    query_labels: Int[np.ndarray, "q"],
    gallery: Float32[np.ndarray, "n d"],
    gallery_labels: Int[np.ndarray, "n"],
) -> Calibration:
    """The best score of each query once its own class is taken out of the gallery.

    Raises:
      UserError: no queries, vectors that are not finite or not of unit length, or a gallery that
        holds nothing but a query's class.
    """
    if not len(queries):
        raise UserError("there are no queries to calibrate with")
    check_unit("queries", queries)
    check_unit("gallery", gallery)
    best = []
    for begin in range(0, len(queries), BLOCK):
        rows = slice(begin, begin + BLOCK)
        scores = queries[rows] @ gallery.T
        own = query_labels[rows, None] == gallery_labels
        best.append(np.where(own, -np.inf, scores).max(axis=1))
    found = np.sort(np.concatenate(best))
    if not np.isfinite(found[0]):
        raise UserError("the gallery holds nothing but the class of a query: nothing is unknown")
    return Calibration(tuple(found.tolist()))
