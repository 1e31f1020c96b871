"""Google Landmarks v2: retrieval in the index set, recognition by the nearest training image."""

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
    """gldv2: mAP@100 of the test images with a solution, by part of the test set.

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
            query: [ids[i] for i in row.tolist()]
            for query, row in zip(solution.queries, found, strict=True)
        }
        positives = dict(zip(solution.queries, solution.answers, strict=True))
        values = landmarks.landmark_precision(lists, positives)
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
    """gldv2_recognition: GAP of nearest-neighbour recognition, by part of the test set.

    The prediction for a test image is the landmark of the nearest training image; its confidence is
    their similarity.

    Raises:
      UserError: lists or images are missing or malformed, or distractors are given.
    """
    if distractors:
        raise UserError(
            f"--distractors: {name} takes none, because every training image has a landmark"
        )
    train_list, ids, labels = gldv2.read_train(root)
    solved, solution = gldv2.read_recognition(root)
    files = [gldv2.image(root, "train", each) for each in ids]
    listed.require(files, train_list)

    def score(
        queries: Float32[np.ndarray, "q d"], gallery: Float32[np.ndarray, "n d"]
    ) -> list[Figure]:
        scores, found = topk(queries, gallery, 1)
        predictions = labels[found[:, 0]]
        pairs = zip(predictions.tolist(), solution.answers, strict=True)
        correct = np.array([str(prediction) in answers for prediction, answers in pairs])
        with_landmark = np.array([bool(answers) for answers in solution.answers])
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
        image_set(files, ids, labels),
        score,
    )


def _test_images(root: Path, solved: Path, solution: Solution) -> ImageSet:
    files = [gldv2.image(root, "test", each) for each in solution.queries]
    listed.require(files, solved)
    return image_set(files, solution.queries)


def _parts(solution: Solution) -> Iterator[tuple[str, Bool[np.ndarray, "q"]]]:
    """Parts of the test set, each with a mask of its queries."""
    for part in sorted(set(solution.usage)):
        yield part, np.array([usage == part for usage in solution.usage])
