"""Protocols of landmark retrieval: revisited Oxford and Paris, Google Landmarks."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from afa.errors import UserError
from afa.evaluation.metrics.retrieval import Ranked, check_finite, map_at_k

CUT = 100
Places = list[Int64[np.ndarray, "_"]]


def difficulties(
    easy: Sequence[Int[np.ndarray, "_"]],
    hard: Sequence[Int[np.ndarray, "_"]],
    junk: Sequence[Int[np.ndarray, "_"]],
) -> dict[str, tuple[Places, Places]]:
    """The three difficulties of revisited Oxford and Paris (Radenović et al. 2018, section 3.3).

    easy: only easy images are right, hard ones do not count; medium: both are right; hard: only
    hard ones are right, easy ones do not count. Junk never counts.

    Returns:
      "easy", "medium" and "hard" -> the positives and what leaves the list, of each query.
    """

    def both(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Places:
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
    """AP@k of each query of the solution, whose mean is the mAP@k of Google Landmarks retrieval.

    A query left unanswered scores 0; one without a right answer has no value (NaN).
    """
    asked = list(solution)
    lists = [np.array(answers.get(query, ()), dtype=object) for query in asked]
    return map_at_k(Ranked.from_lists(lists, [solution[query] for query in asked]), k)


def global_average_precision(
    confidence: Float[np.ndarray, "n"], correct: Bool[np.ndarray, "n"], landmarks: int
) -> float:
    """GAP (µAP) of landmark recognition: one average precision over the answers of all images.

    Args:
      confidence: score of the one answer of each answered image; equal scores keep their order.
      correct: whether the answer is right (never, for an image without a landmark).
      landmarks: images that show a landmark, answered or not.

    Raises:
      UserError: a confidence is NaN or infinite, or more answers are right than can be.
    """
    check_finite("confidence", confidence)
    if landmarks < max(1, int(correct.sum())):
        raise UserError(f"{correct.sum()} right answers, but only {landmarks} images to find")
    right = correct[np.argsort(-confidence, kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(precision[right].sum() / landmarks)
