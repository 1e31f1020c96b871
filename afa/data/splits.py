"""How classes are shared out: train, validation and test never have one in common."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int64

from afa.config import DataConfig
from afa.data.types import Dataset, ImageSet, Picture, fingerprint
from afa.errors import UserError

LEAST_CLASSES = 2  # in a split: with one class every answer would be right
LEAST_PICTURES = 2  # in a class: a query and something to find

TRAIN, VALIDATION, TEST = "train", "validation", "test"

Class = TypeVar("Class", str, int)  # a class by its name, or by its id


def halves(classes: Sequence[Class]) -> tuple[list[Class], list[Class]]:
    """First half (the larger one) and rest of the classes in sorted order."""
    ordered = sorted(classes)
    middle = (len(ordered) + 1) // 2
    return ordered[:middle], ordered[middle:]


def hold_out(classes: Sequence[Class], config: DataConfig) -> tuple[list[Class], list[Class]]:
    """Training and validation classes, both in the order given.

    `config.validation_fraction` of the classes, rounded, are drawn with `config.split_seed`; at
    least two.

    Raises:
      UserError: fewer than two classes are left on either side.
    """
    count = max(LEAST_CLASSES, round(config.validation_fraction * len(classes)))
    if len(classes) - count < LEAST_CLASSES:
        raise UserError(
            f"data.validation_fraction={config.validation_fraction} leaves "
            f"{max(0, len(classes) - count)} of {len(classes)} classes to train on, and "
            f"{LEAST_CLASSES} are needed: lower it, or add classes"
        )
    rng = np.random.default_rng(config.split_seed)
    drawn = set(rng.choice(len(classes), count, replace=False).tolist())
    kept = [name for i, name in enumerate(classes) if i not in drawn]
    return kept, [classes[i] for i in sorted(drawn)]


def held_out_text(count: int, config: DataConfig) -> str:
    """The part of a protocol sentence that tells of `hold_out`."""
    return f"{count} of them, drawn with data.split_seed={config.split_seed}, validate"


def assemble(
    name: str,
    images: Sequence[Picture],
    ids: Sequence[str],
    labels: Int64[np.ndarray, "n"],
    catalogue: Bool[np.ndarray, "n"],
    sizes: Sequence[int],
    class_names: Sequence[str],
    split_of_class: dict[int, str],
    protocol: str,
    skipped: Sequence[str] = (),
) -> Dataset:
    """Cuts one pool of pictures into the three splits; pictures of other classes are left out.

    Args:
      sizes: bytes of each encoded picture, for the fingerprint.
      split_of_class: class id -> "train", "validation" or "test".

    Raises:
      UserError: a split with fewer than two classes, or a class with fewer than two pictures.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    parts = {}
    pool = ImageSet(images, labels, tuple(ids), catalogue)
    for split in (TRAIN, VALIDATION, TEST):
        classes = [c for c, place in split_of_class.items() if place == split]
        if len(classes) < LEAST_CLASSES:
            raise UserError(
                f"{name}: {len(classes)} {split} classes, and at least {LEAST_CLASSES} are needed"
            )
        for c in classes:
            if counts[c] < LEAST_PICTURES:
                raise UserError(
                    f"{name}: class {class_names[c]!r} has {counts[c]} readable "
                    f"{'picture' if counts[c] == 1 else 'pictures'}, and at least {LEAST_PICTURES} "
                    "are needed in every class: add some, or remove the class"
                )
        parts[split] = pool.subset(np.flatnonzero(np.isin(labels, classes)))
    rows = (
        (picture, int(label), split_of_class[int(label)], size)
        for picture, label, size in zip(ids, labels, sizes, strict=True)
        if int(label) in split_of_class
    )
    return Dataset(
        name=name,
        **parts,
        class_names=tuple(class_names),
        protocol=protocol,
        fingerprint=fingerprint(rows),
        skipped=tuple(skipped),
    )
