"""Google Landmarks Dataset v2 (Weyand et al. 2020): CSV files and folders of images.

The image with id `abcdef...` is `train/a/b/c/abcdef....jpg`; `index/` and `test/` are laid out
alike. `train_clean.csv` (landmark_id, images) is preferred to `train.csv` (id, landmark_id).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from afa.config import DataConfig
from afa.data.sources import listed
from afa.data.splits import LEAST_IMAGES, TEST, TRAIN, VALIDATION, held_out_text, hold_out
from afa.data.types import Dataset
from afa.errors import UserError

CLEAN, FULL = "train_clean.csv", "train.csv"
RETRIEVAL = ("retrieval_solution_v2.1.csv", "retrieval_solution_v2.csv", "retrieval_solution.csv")
RECOGNITION = (
    "recognition_solution_v2.1.csv", "recognition_solution_v2.csv", "recognition_solution.csv",
)  # fmt: skip
IGNORED = "Ignored"
TEST_EVERY = 10  # one landmark in this many is for testing


@dataclass(frozen=True)
class Solution:
    """Ground truth of the queries that are not ignored.

    Attributes:
      queries: query ids.
      answers: for each query, the correct index images, or landmarks.
      usage: for each query, its part of the test set, such as Public or Private.
    """

    queries: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    usage: tuple[str, ...]


def image(root: Path, part: str, name: str) -> str:
    """Returns the path of an image.

    Args:
      part: "train", "index" or "test".
      name: image id.
    """
    return f"{root}/{part}/{name[0:1]}/{name[1:2]}/{name[2:3]}/{name}.jpg"


def read_train(root: Path) -> tuple[Path, tuple[str, ...], Int64[np.ndarray, "n"]]:
    """Returns the CSV file that was read, and the ids and landmarks of the training images.

    Raises:
      UserError: missing or malformed CSV file.
    """
    path = listed.find(root, (CLEAN, FULL), f"the training images of Landmarks v2 (or {FULL})")
    if path.name == CLEAN:
        pairs = [
            (name, landmark)
            for landmark, names in listed.rows(path, ("landmark_id", "images"))
            for name in names.split()
        ]
    else:
        pairs = list(listed.rows(path, ("id", "landmark_id")))
    try:
        landmarks = np.array([int(landmark) for _, landmark in pairs], np.int64)
    except ValueError as error:
        raise UserError(f"{path}: a landmark_id is not an integer ({error})") from None
    if not pairs:
        raise UserError(f"{path}: lists no images")
    return path, tuple(name for name, _ in pairs), landmarks


def read_index(root: Path) -> tuple[Path, tuple[str, ...]]:
    """Returns the CSV file that was read, and the ids of the gallery images.

    Raises:
      UserError: missing or malformed CSV file.
    """
    path = listed.find(root, ("index.csv",), "the index images of Landmarks v2, in a column id")
    return path, tuple(name for (name,) in listed.rows(path, ("id",)))


def read_retrieval(root: Path) -> tuple[Path, Solution]:
    """Returns the CSV file that was read, and the index images with the landmark of each query.

    Raises:
      UserError: missing or malformed CSV file.
    """
    return _solution(root, RETRIEVAL, "images", "the retrieval solution of Landmarks v2")


def read_recognition(root: Path) -> tuple[Path, Solution]:
    """Returns the CSV file that was read, and the landmarks of each test image; many have none.

    Raises:
      UserError: missing or malformed CSV file.
    """
    return _solution(root, RECOGNITION, "landmarks", "the recognition solution of Landmarks v2")


def _solution(root: Path, names: Sequence[str], column: str, what: str) -> tuple[Path, Solution]:
    path = listed.find(root, names, what)
    found = list(listed.rows(path, ("id", column, "Usage")))
    kept = [(name, answers, usage) for name, answers, usage in found if usage != IGNORED]
    if not kept:
        raise UserError(f"{path}: lists no images")
    answers = tuple(() if text == "None" else tuple(text.split()) for _, text, _ in kept)
    queries, usage = tuple(name for name, _, _ in kept), tuple(usage for _, _, usage in kept)
    return path, Solution(queries, answers, usage)


def load_gldv2(config: DataConfig) -> Dataset:
    """Loads `data.name=gldv2`: every tenth landmark of the training list, in order of landmark id,
    is for testing, the others for training and validation. Landmarks with one image are skipped.

    Raises:
      UserError: missing or malformed CSV file, missing images, or too few landmarks.
    """
    root = listed.directory("data.path", config.path)
    path, ids, landmarks = read_train(root)
    names, labels, counts = np.unique(landmarks, return_inverse=True, return_counts=True)
    usable = np.flatnonzero(counts >= LEAST_IMAGES)
    is_test = np.arange(len(usable)) % TEST_EVERY == TEST_EVERY - 1
    training, testing = usable[~is_test].tolist(), usable[is_test].tolist()
    training, validating = hold_out(training, config)
    files = [image(root, "train", name) for name in ids]
    split_classes = {TRAIN: training, VALIDATION: validating, TEST: testing}
    return listed.dataset(
        config,
        path,
        files,
        ids,
        labels.astype(np.int64),
        [str(name) for name in names],
        split_classes,
        f"class-disjoint: of {len(usable)} landmarks of {path.name} with {LEAST_IMAGES} images "
        f"or more every tenth tests, the other {len(training) + len(validating)} train "
        f"({held_out_text(len(validating), config)})",
    )
