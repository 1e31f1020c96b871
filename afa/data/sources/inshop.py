"""DeepFashion In-Shop Clothes Retrieval (Liu et al. 2016): `list_eval_partition.txt` and images.

Each line of the list has the path, the item and "train", "query" or "gallery". 3,997 items are for
training; the 3,985 test items have 14,218 queries and 12,612 gallery images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from afa.config import DataConfig
from afa.data.sources import listed
from afa.data.sources.folder import GALLERY, QUERY
from afa.data.splits import TEST, TRAIN, VALIDATION, held_out_text, hold_out
from afa.data.types import Dataset
from afa.errors import UserError

LIST = "list_eval_partition.txt"
LIST_PATHS = (LIST, f"Eval/{LIST}", f"Anno/{LIST}")
COLUMNS = ["image_name", "item_id", "evaluation_status"]


@dataclass(frozen=True)
class Partition:
    """The images of the list, in its order.

    Attributes:
      source: path of the list.
      paths: paths of the images.
      ids: paths as written in the list.
      items: item names, sorted.
      labels: for each image, its index in `items`.
      status: for each image, "train", "query" or "gallery".
    """

    source: Path
    paths: tuple[Path, ...]
    ids: tuple[str, ...]
    items: tuple[str, ...]
    labels: Int64[np.ndarray, "n"]
    status: tuple[str, ...]

    def having(self, *status: str) -> Bool[np.ndarray, "n"]:
        """Returns a mask of the images with one of these statuses."""
        return np.isin(self.status, status)


def read_partition(root: Path) -> Partition:
    """Reads the list and finds the folder of its images under `root`.

    Raises:
      UserError: the list is missing or malformed.
    """
    path = listed.find(root, LIST_PATHS, "the partition of DeepFashion In-Shop")
    lines = _lines(path)
    first = lines[0][0]
    tops = [root / top for top in ("", "Img", "img", "Image")]
    top = next((top for top in tops if (top / first).is_file()), root)
    paths = tuple(top / name for name, _, _ in lines)
    items = sorted({item for _, item, _ in lines})
    number_of = {item: i for i, item in enumerate(items)}
    return Partition(
        path,
        paths,
        tuple(name for name, _, _ in lines),
        tuple(items),
        np.array([number_of[item] for _, item, _ in lines], np.int64),
        tuple(status for _, _, status in lines),
    )


def load_inshop(config: DataConfig) -> Dataset:
    """Loads `data.name=inshop`: the items of "train" are for training and validation, the others
    for testing with the given queries and gallery.

    Raises:
      UserError: missing or malformed list, missing images, items in both train and test, or too few
        items.
    """
    found = read_partition(listed.directory("data.path", config.path))
    training = set(found.labels[found.having(TRAIN)].tolist())
    testing = set(found.labels[found.having(QUERY, GALLERY)].tolist())
    if shared := training & testing:
        raise UserError(f"{LIST}: item {found.items[min(shared)]!r} is in train and in test")
    kept, validating = hold_out(sorted(training), config)
    split_classes = {TRAIN: kept, VALIDATION: validating, TEST: sorted(testing)}
    return listed.dataset(
        config,
        found.source,
        found.paths,
        found.ids,
        found.labels,
        found.items,
        split_classes,
        f"class-disjoint: {len(training)} items of In-Shop's train train "
        f"({held_out_text(len(validating), config)}), its other {len(testing)} test, queries among "
        "the gallery",
        found.having(GALLERY),
    )


def _lines(path: Path) -> list[tuple[str, str, str]]:
    try:
        text = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if len(text) < 2:
        raise UserError(f"{path}: has {len(text)} lines, and the images start at line 3")
    count, header, *lines = text
    if header.split() != COLUMNS:
        raise UserError(f"{path}: line 2 is {header[:80]!r}, expected {' '.join(COLUMNS)!r}")
    found = []
    for number, line in enumerate(lines, start=3):
        words = line.split()
        if len(words) != len(COLUMNS) or words[2] not in (TRAIN, QUERY, GALLERY):
            raise UserError(
                f"{path}: line {number} is {line[:80]!r}, expected a path, an item, and train, "
                "query or gallery"
            )
        found.append((words[0], words[1], words[2]))
    if not found or str(len(found)) != count.strip():
        raise UserError(f"{path}: holds {len(found)} images, and its first line says {count!r}")
    return found
