"""Revisited Oxford and Paris (Radenović et al. 2018): `gnd_NAME.pkl` and the images in `jpg/`.

The ground truth lists the gallery images and the queries, and for each query its bounding box and
the easy, hard and junk gallery images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from afa.data.sources import listed
from afa.data.sources.pickles import read_pickle
from afa.errors import UserError

LABELS = ("easy", "hard", "junk")
Indices = tuple[Int64[np.ndarray, "_"], ...]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class GroundTruth:
    """Ground truth of a benchmark.

    Attributes:
      gallery, queries: image files, in the order of the ground truth.
      boxes: for each query, (left, top, right, bottom) in pixels; None if the whole image is the
        query.
      easy, hard, junk: for each query, indices into `gallery`.
    """

    gallery: tuple[Path, ...]
    queries: tuple[Path, ...]
    boxes: tuple[Box | None, ...]
    easy: Indices
    hard: Indices
    junk: Indices


def read_ground_truth(root: Path, name: str) -> GroundTruth:
    """Reads `gnd_NAME.pkl` in `root` or `root/NAME`, without executing code from the pickle.

    Args:
      name: roxford5k, rparis6k, or another data set in this format.

    Raises:
      UserError: missing file, another format, or missing images.
    """
    file = f"gnd_{name}.pkl"
    path = listed.find(root, (file, f"{name}/{file}"), f"the ground truth of {name}")
    found = read_pickle(path)
    names, query_names, truth = (_list(path, found, key) for key in ("imlist", "qimlist", "gnd"))
    if len(query_names) != len(truth) or not len(query_names) or not len(names):
        raise UserError(
            f"{path}: holds {len(names)} images, {len(query_names)} queries and ground truth of "
            f"{len(truth)}"
        )
    folder = listed.find(path.parent, ("jpg",), f"the folder of the images of {name}")
    gallery, queries = (
        tuple(folder / f"{str(each).removesuffix('.jpg')}.jpg" for each in part)
        for part in (names, query_names)
    )
    listed.require([*gallery, *queries], path)
    easy, hard, junk = (
        tuple(_indices(path, query, one, key, len(names)) for query, one in enumerate(truth))
        for key in LABELS
    )
    boxes = tuple(_box(path, query, one) for query, one in enumerate(truth))
    return GroundTruth(gallery, queries, boxes, easy, hard, junk)


def _list(path: Path, found: Any, key: str) -> list[Any]:
    if not isinstance(found, dict) or not isinstance(found.get(key), list | tuple | np.ndarray):
        raise UserError(f"{path}: is not a ground truth (expected lists imlist, qimlist and gnd)")
    return list(found[key])


def _indices(path: Path, query: int, truth: Any, key: str, count: int) -> Int64[np.ndarray, "_"]:
    if not isinstance(truth, dict) or key not in truth:
        raise UserError(f"{path}: query {query} has no {key!r} (expected easy, hard and junk)")
    index = np.asarray(truth[key]).reshape(-1)
    if len(index) and (index.dtype.kind not in "iu" or np.any((index < 0) | (index >= count))):
        raise UserError(f"{path}: query {query}: {key!r} are not indices of {count} images")
    return index.astype(np.int64)


def _box(path: Path, query: int, truth: Any) -> Box | None:
    if truth.get("bbx") is None:
        return None
    box = np.asarray(truth["bbx"]).reshape(-1)
    if box.shape != (4,) or box.dtype.kind not in "iuf" or not np.all(box[:2] < box[2:]):
        raise UserError(f"{path}: query {query}: 'bbx' is {truth['bbx']!r}, not a box of 4 numbers")
    left, top, right, bottom = (float(side) for side in box)
    return left, top, right, bottom
