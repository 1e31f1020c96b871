"""Google Landmarks v2: retrieval in the index, and recognition by the nearest training image."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32

from afa.data.sources import gldv2, listed
from afa.data.sources.gldv2 import Solution
from afa.data.types import ImageSet
from afa.errors import UserError
from afa.evaluation.benchmarks.contract import Benchmark, Figure, image_set, mean_figure
from afa.evaluation.metrics import landmarks
from afa.retrieval.exact import topk


def load_retrieval(name: str, root: Path, distractors: Sequence[Path]) -> Benchmark:
    """gldv2: mAP@100 of the test images that have a solution, by part of the test set.

    Raises:
      UserError: lists or images are missing or malformed.
    """
    index_list, index = gldv2.read_index(root)
    solved, solution = gldv2.read_retrieval(root)
    files = [gldv2.image(root, "index", each) for each in index]
    listed.require(files, index_list)
    ids = [*index, *map(str, distractors)]

    def score(
        queries: Float32[np.ndarray, "q d"], gallery: Float32[np.ndarray, "n d"]
    ) -> list[Figure]:
        _, found = topk(queries, gallery, min(landmarks.CUT, len(gallery)))
        lists = {
            query: [ids[place] for place in row.tolist()]
            for query, row in zip(solution.queries, found, strict=True)
        }
        right = dict(zip(solution.queries, solution.answers, strict=True))
        values = landmarks.landmark_precision(lists, right)
        return [
            mean_figure(part, f"mAP@{landmarks.CUT}", values[chosen])
            for part, chosen in _parts(solution)
            if not np.isnan(values[chosen]).all()
        ]

    return Benchmark(
        name,
        f"{len(solution.queries)} queries among {len(ids)} images; mAP@{landmarks.CUT}",
        _test_images(root, solved, solution),
        image_set([*files, *distractors], ids),
        score,
    )


def load_recognition(name: str, root: Path, distractors: Sequence[Path]) -> Benchmark:
    """gldv2_recognition: every test image is given the landmark of its nearest training image,
    with their similarity as confidence; GAP by part of the test set.

    Raises:
      UserError: lists or images are missing or malformed, or distractors are given.
    """
    if distractors:
        raise UserError(f"--distractors: {name} has none, every training image has a landmark")
    train_list, ids, shown = gldv2.read_train(root)
    solved, solution = gldv2.read_recognition(root)
    files = [gldv2.image(root, "train", each) for each in ids]
    listed.require(files, train_list)

    def score(
        queries: Float32[np.ndarray, "q d"], gallery: Float32[np.ndarray, "n d"]
    ) -> list[Figure]:
        scores, found = topk(queries, gallery, 1)
        answers = shown[found[:, 0]]
        pairs = zip(answers.tolist(), solution.answers, strict=True)
        correct = np.array([str(answer) in right for answer, right in pairs])
        with_landmark = np.array([bool(right) for right in solution.answers])
        return [
            Figure(part, "GAP", gap, None, int(chosen.sum()))
            for part, chosen in _parts(solution)
            if (count := int(with_landmark[chosen].sum()))
            for gap in [
                landmarks.global_average_precision(scores[chosen, 0], correct[chosen], count)
            ]
        ]

    return Benchmark(
        name,
        f"{len(solution.queries)} images, {sum(map(bool, solution.answers))} of them with a "
        f"landmark, by the nearest of {len(ids)} training images; GAP",
        _test_images(root, solved, solution),
        image_set(files, ids, shown),
        score,
    )


def _test_images(root: Path, solved: Path, solution: Solution) -> ImageSet:
    files = [gldv2.image(root, "test", each) for each in solution.queries]
    listed.require(files, solved)
    return image_set(files, solution.queries)


def _parts(solution: Solution) -> Iterator[tuple[str, Bool[np.ndarray, "q"]]]:
    """Every part of the test set and which queries belong to it; the whole set where it has one."""
    for part in sorted(set(solution.usage)):
        yield part, np.array([usage == part for usage in solution.usage])
