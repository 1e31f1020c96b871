"""Revisited Oxford and Paris (Radenović et al. 2018): `gnd_NAME.pkl` and the images of `jpg/`.

The ground truth has the names of the database and of the queries, and for each query its box and
which images of the database are easy, hard or junk.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from afa.data.sources import listed
from afa.data.sources.pickles import read_pickle
from afa.errors import UserError

JUDGED = ("easy", "hard", "junk")
Places = tuple[Int64[np.ndarray, "_"], ...]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class GroundTruth:
    """What the ground truth says.

    Attributes:
      gallery, queries: files, in the order of the ground truth.
      boxes: left, top, right and bottom of each query in its image, in pixels; None where the
        ground truth has none and the whole image asks.
      easy, hard, junk: for each query, places in `gallery`.
    """

    gallery: tuple[Path, ...]
    queries: tuple[Path, ...]
    boxes: tuple[Box | None, ...]
    easy: Places
    hard: Places
    junk: Places


def read_ground_truth(root: Path, name: str) -> GroundTruth:
    """Reads `gnd_NAME.pkl` in `root` or `root/NAME`; nothing that the file holds is run.

    Args:
      name: roxford5k, rparis6k, or another set in this form.

    Raises:
      UserError: no such file, not this form, or images of it that are missing.
    """
    file = f"gnd_{name}.pkl"
    path = listed.find(root, (file, f"{name}/{file}"), f"the ground truth of {name}")
    found = read_pickle(path)
    names, asking, judged = (_list(path, found, key) for key in ("imlist", "qimlist", "gnd"))
    if len(asking) != len(judged) or not len(asking) or not len(names):
        raise UserError(
            f"{path}: holds {len(names)} images, {len(asking)} queries, {len(judged)} judgements"
        )
    folder = listed.find(path.parent, ("jpg",), f"the folder of the images of {name}")
    gallery, queries = (
        tuple(folder / f"{str(each).removesuffix('.jpg')}.jpg" for each in part)
        for part in (names, asking)
    )
    listed.require([*gallery, *queries], path)
    easy, hard, junk = (
        tuple(_places(path, query, one, key, len(names)) for query, one in enumerate(judged))
        for key in JUDGED
    )
    boxes = tuple(_box(path, query, one) for query, one in enumerate(judged))
    return GroundTruth(gallery, queries, boxes, easy, hard, junk)


def _list(path: Path, found: Any, key: str) -> list[Any]:
    if not isinstance(found, dict) or not isinstance(found.get(key), list | tuple | np.ndarray):
        raise UserError(f"{path}: is no ground truth (expected lists imlist, qimlist and gnd)")
    return list(found[key])


def _places(path: Path, query: int, judged: Any, key: str, count: int) -> Int64[np.ndarray, "_"]:
    if not isinstance(judged, dict) or key not in judged:
        raise UserError(f"{path}: query {query} has no {key!r} (expected easy, hard and junk)")
    places = np.asarray(judged[key]).reshape(-1)
    if len(places) and (places.dtype.kind not in "iu" or np.any((places < 0) | (places >= count))):
        raise UserError(f"{path}: query {query}: {key!r} are no places among {count} images")
    return places.astype(np.int64)


def _box(path: Path, query: int, judged: Any) -> Box | None:
    if judged.get("bbx") is None:
        return None
    box = np.asarray(judged["bbx"]).reshape(-1)
    if box.shape != (4,) or box.dtype.kind not in "iuf" or not np.all(box[:2] < box[2:]):
        raise UserError(f"{path}: query {query}: 'bbx' is {judged['bbx']!r}, no box of 4 numbers")
    left, top, right, bottom = (float(side) for side in box)
    return left, top, right, bottom
