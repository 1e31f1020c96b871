"""Calibrates the "no match" threshold: the similarity that queries of unknown objects reach.

The similarity of the nearest image depends on the network, the images and the size of the gallery.
So the threshold is estimated with unknown queries: images of validation classes, searched in the
gallery that is served, without the images of their own class. The false match rate of a threshold
is the share of unknown queries whose best score reaches it.
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
    """Scores of unknown queries.

    Attributes:
      scores: the best score of each unknown query, ascending.
    """

    scores: tuple[float, ...]

    @classmethod
    def load(cls, stored: Sequence[float] | None) -> "Calibration":
        """Takes the scores from the manifest of an export.

        Raises:
          UserError: the export has no scores.
        """
        if not stored:
            raise UserError("this index was made without calibration: export and build it again")
        return cls(tuple(stored))

    def threshold(self, rate: float) -> float:
        """Returns the lowest threshold with at most this false match rate.

        Raises:
          UserError: the rate is not between 0 and 1, or there are too few queries to measure it.
        """
        count = len(self.scores)
        if not 0 < rate < 1:
            raise UserError(f"false_matches={rate} must lie between 0 and 1")
        allowed = math.floor(rate * count + 1e-9)
        if allowed < 1:
            raise UserError(
                f"false_matches={rate} cannot be measured with {count} unknown queries:"
                f" the least is {1 / count:.2g}"
            )
        # The next float above the highest score that must be rejected.
        return float(np.nextafter(np.float32(self.scores[count - allowed - 1]), np.float32(2)))


def require_apart(unknown: Sequence[Path], gallery: Sequence[Path]) -> None:
    """Checks that no image of the unknown queries is in the gallery.

    Such an image scores 1, so that the threshold would reject every query.

    Args:
      unknown, gallery: image files; copies under another name are found as well.

    Raises:
      UserError: names the first such image.
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
    """Searches each query in the gallery without the images of its own class.

    Args:
      queries: unit vectors of unknown queries.
      query_labels: class of each query.
      gallery: unit vectors.
      gallery_labels: class of each gallery row.

    Raises:
      UserError: no queries, vectors that are not finite or not of unit length, or a gallery with
        only one class, that of a query.
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
        raise UserError("the gallery holds only the class of a query: no query is unknown")
    return Calibration(tuple(found.tolist()))
