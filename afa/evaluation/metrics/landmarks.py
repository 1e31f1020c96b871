"""Metrics of landmark retrieval: revisited Oxford and Paris, Google Landmarks."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from afa.errors import UserError
from afa.evaluation.metrics.retrieval import Ranked, check_finite, map_at_k

CUT = 100  # results per query that Google Landmarks scores
Rows = list[Int64[np.ndarray, "_"]]  # gallery rows of each query


def difficulties(
    easy: Sequence[Int[np.ndarray, "_"]],
    hard: Sequence[Int[np.ndarray, "_"]],
    junk: Sequence[Int[np.ndarray, "_"]],
) -> dict[str, tuple[Rows, Rows]]:
    """Positives and junk of revisited Oxford and Paris (Radenović et al. 2018, section 3.3).

    "easy": easy images are positives, hard images are junk. "medium": both are positives. "hard":
    hard images are positives, easy images are junk. `junk` is junk in all three.

    Args:
      easy, hard, junk: gallery rows of each query.

    Returns:
      "easy", "medium" and "hard" -> (positives, junk) of each query. Junk is removed from a ranking
      before it is scored.
    """

    def both(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Rows:
        pairs = zip(first, second, strict=True)
        return [np.concatenate(pair).astype(np.int64) for pair in pairs]

    nothing = [np.zeros(0, np.int64)] * len(easy)
    return {
        "easy": (both(easy, nothing), both(junk, hard)),
        "medium": (both(easy, hard), both(junk, nothing)),
        "hard": (both(hard, nothing), both(junk, easy)),
    }


def landmark_precision(
    answers: Mapping[str, Sequence[str]],
    solution: Mapping[str, Collection[str]],
    k: int = CUT,
) -> Float64[np.ndarray, "q"]:
    """AP@k of each query; the mean is the mAP@k of Google Landmarks retrieval.

    Args:
      answers: query -> results, best first.
      solution: query -> positives.
      k: results that are scored.

    Returns:
      One value per query of the solution, in its order: 0 without an answer, NaN without positives.
    """
    queries = list(solution)
    lists = [np.array(answers.get(query, ()), dtype=object) for query in queries]
    return map_at_k(Ranked.from_lists(lists, [solution[query] for query in queries]), k)


def global_average_precision(
    confidence: Float[np.ndarray, "n"], correct: Bool[np.ndarray, "n"], landmarks: int
) -> float:
    """GAP (µAP) of landmark recognition: one average precision over the predictions of all images.

    Args:
      confidence: score of the prediction of each image; equal scores keep their order.
      correct: whether the prediction is correct (False for an image without a landmark).
      landmarks: number of images that show a landmark, with or without a prediction.

    Raises:
      UserError: a confidence is NaN or infinite, or more predictions are correct than `landmarks`.
    """
    check_finite("confidence", confidence)
    if landmarks < max(1, int(correct.sum())):
        raise UserError(
            f"{correct.sum()} predictions are correct, but only {landmarks} images show a landmark"
        )
    right = correct[np.argsort(-confidence, kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(precision[right].sum() / landmarks)
