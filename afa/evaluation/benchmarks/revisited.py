"""Revisited Oxford and Paris, at three difficulties, with junk and distractors."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import cv2
import numpy as np
from jaxtyping import Float32

from afa.data.images import decode
from afa.data.sources.revisited import Box, read_ground_truth
from afa.data.types import Files, ImageSet
from afa.evaluation.benchmarks.contract import Benchmark, Figure, image_set, mean_figure
from afa.evaluation.metrics import landmarks
from afa.evaluation.metrics import retrieval as metrics
from afa.evaluation.metrics.retrieval import Ranked

CUTS = (1, 5, 10)


class Cropped(Sequence[bytes]):
    """Encoded images of files, each cropped to its box on access and encoded as PNG.

    An image whose box is None is returned as it is.
    """

    def __init__(self, files: Files, boxes: Sequence[Box | None]) -> None:
        self.files, self.boxes = files, boxes

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "Cropped": ...
    def __getitem__(self, index: int | slice) -> "bytes | Cropped":
        if isinstance(index, slice):
            return Cropped(self.files[index], self.boxes[index])
        box = self.boxes[index]
        if box is None:
            return self.files[index]
        pixels = decode(self.files[index])
        height, width = pixels.shape[:2]
        left, top = (
            min(max(round(side), 0), most - 1)
            for side, most in zip(box[:2], (width, height), strict=True)
        )
        right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
        part = cv2.cvtColor(pixels[top:bottom, left:right], cv2.COLOR_RGB2BGR)
        return cv2.imencode(".png", part)[1].tobytes()


def load_revisited(name: str, root: Path, distractors: Sequence[Path]) -> Benchmark:
    """roxford5k and rparis6k: mAP (trapezoidal rule) and mP@k at three difficulties.

    Queries are cropped to their boxes.

    Raises:
      UserError: ground truth or images are missing or malformed.
    """
    truth = read_ground_truth(root, name)
    names = [path.name for path in truth.queries]
    images = Cropped(Files(map(str, truth.queries)), truth.boxes)
    zeros = np.zeros(len(names), np.int64)
    gallery_files = [*truth.gallery, *distractors]

    def score(
        queries: Float32[np.ndarray, "q d"], gallery: Float32[np.ndarray, "n d"]
    ) -> list[Figure]:
        figures = []
        levels = landmarks.difficulties(truth.easy, truth.hard, truth.junk)
        for level, (positives, junk) in levels.items():
            ranked = Ranked.from_vectors(queries, gallery, positives, junk)
            if not ranked.scored.any():
                continue
            precision = metrics.average_precision_trapezoid(ranked)
            figures.append(mean_figure(level, "mAP", precision))
            figures += [
                mean_figure(level, f"mP@{k}", metrics.precision_to_last(ranked, k)) for k in CUTS
            ]
        return figures

    return Benchmark(
        name,
        f"{len(names)} queries, cropped to their boxes, among {len(truth.gallery)} images"
        + (f" and {len(distractors)} distractors" if distractors else "")
        + "; junk is removed, mAP by the trapezoidal rule",
        ImageSet(images, zeros, tuple(names), zeros.astype(bool)),
        image_set(gallery_files, [str(path) for path in gallery_files]),
        score,
    )
