"""Google Landmarks Dataset v2 (Weyand et al. 2020): its CSV files and folders of images.

The image of id `abcdef...` lies at `train/a/b/c/abcdef....jpg`, and likewise below `index/` and
`test/`. `train_clean.csv` (landmark_id, images) is preferred to `train.csv` (id, landmark_id).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from afa.config import DataConfig
from afa.data.sources import listed
from afa.data.splits import LEAST_PICTURES, TEST, TRAIN, VALIDATION, held_out_text, hold_out
from afa.data.types import Dataset
from afa.errors import UserError

CLEAN, FULL = "train_clean.csv", "train.csv"
RETRIEVAL = ("retrieval_solution_v2.1.csv", "retrieval_solution_v2.csv", "retrieval_solution.csv")
RECOGNITION = (
    "recognition_solution_v2.1.csv", "recognition_solution_v2.csv", "recognition_solution.csv",
)  # fmt: skip
IGNORED = "Ignored"
TESTED = 10  # every so many landmarks one tests


@dataclass(frozen=True)
class Solution:
    """The right answers of the queries that count.

    Attributes:
      queries: their ids.
      answers: images of the index, or landmarks, of each.
      usage: part of the test set it belongs to, such as Public and Private.
    """

    queries: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    usage: tuple[str, ...]


def image(root: Path, part: str, name: str) -> str:
    """Where an image lies.

    Args:
      part: "train", "index" or "test".
      name: its id.
    """
    return f"{root}/{part}/{name[0:1]}/{name[1:2]}/{name[2:3]}/{name}.jpg"


def read_train(root: Path) -> tuple[Path, tuple[str, ...], Int64[np.ndarray, "n"]]:
    """The list that was read, and the training images' ids and landmarks.

    Raises:
      UserError: no list, or a malformed one.
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
        raise UserError(f"{path}: a landmark_id is no whole number ({error})") from None
    if not pairs:
        raise UserError(f"{path}: lists no images")
    return path, tuple(name for name, _ in pairs), landmarks


def read_index(root: Path) -> tuple[Path, tuple[str, ...]]:
    """The list that was read, and the ids of the images that are searched.

    Raises:
      UserError: no list, or a malformed one.
    """
    path = listed.find(root, ("index.csv",), "the index images of Landmarks v2, a column id")
    return path, tuple(name for (name,) in listed.rows(path, ("id",)))


def read_retrieval(root: Path) -> tuple[Path, Solution]:
    """The list that was read, and which index images show the landmark of a test image.

    Raises:
      UserError: no list, or a malformed one.
    """
    return _solution(root, RETRIEVAL, "images", "the retrieval solution of Landmarks v2")


def read_recognition(root: Path) -> tuple[Path, Solution]:
    """The list that was read, and the landmarks of every test image; none for many.

    Raises:
      UserError: no list, or a malformed one.
    """
    return _solution(root, RECOGNITION, "landmarks", "the recognition solution of Landmarks v2")


def _solution(root: Path, names: Sequence[str], column: str, holding: str) -> tuple[Path, Solution]:
    path = listed.find(root, names, holding)
    found = list(listed.rows(path, ("id", column, "Usage")))
    kept = [(name, answers, usage) for name, answers, usage in found if usage != IGNORED]
    if not kept:
        raise UserError(f"{path}: lists no images")
    answers = tuple(() if text == "None" else tuple(text.split()) for _, text, _ in kept)
    queries, usage = tuple(name for name, _, _ in kept), tuple(usage for _, _, usage in kept)
    return path, Solution(queries, answers, usage)


def load_gldv2(config: DataConfig) -> Dataset:
    """`data.name=gldv2`: every tenth landmark of the training list, by number, tests, the others
    train and validate. Landmarks with one image are left out.

    Raises:
      UserError: no list, a malformed one, images of it that are missing, or too few landmarks.
    """
    root = listed.directory("data.path", config.path)
    path, ids, landmarks = read_train(root)
    names, labels, counts = np.unique(landmarks, return_inverse=True, return_counts=True)
    usable = np.flatnonzero(counts >= LEAST_PICTURES)
    tests = np.arange(len(usable)) % TESTED == TESTED - 1
    training, testing = usable[~tests].tolist(), usable[tests].tolist()
    training, validating = hold_out(training, config)
    files = [image(root, "train", name) for name in ids]
    where = {TRAIN: training, VALIDATION: validating, TEST: testing}
    return listed.dataset(
        config,
        path,
        files,
        ids,
        labels.astype(np.int64),
        [str(name) for name in names],
        where,
        f"class-disjoint: of {len(usable)} landmarks of {path.name} with {LEAST_PICTURES} images "
        f"or more every tenth tests, the other {len(training) + len(validating)} train "
        f"({held_out_text(len(validating), config)})",
    )
