"""How classes are shared out: train, validation and test never have one in common."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int64

from afa.config import DataConfig
from afa.data.types import Dataset, ImageSet, RawImage, fingerprint
from afa.errors import UserError

LEAST_CLASSES = 2  # in a split: with one class every answer would be right
LEAST_PICTURES = 2  # in a class: a query and something to find

SHOWN = 3  # lines on what was left out that an error repeats

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
    least two. With `config.folds` it is one part of the classes instead (`fold`).

    Raises:
      UserError: fewer than two classes are left on either side.
    """
    if config.folds:
        part = set(fold(len(classes), config).tolist())
        kept = [name for i, name in enumerate(classes) if i not in part]
        return kept, [name for i, name in enumerate(classes) if i in part]
    count = max(LEAST_CLASSES, round(config.validation_fraction * len(classes)))
    if len(classes) < 2 * LEAST_CLASSES:
        raise UserError(
            f"{len(classes)} {'class is' if len(classes) == 1 else 'classes are'} left to train "
            f"and validate on, and at least {2 * LEAST_CLASSES} are needed, {LEAST_CLASSES} for "
            "each: add classes"
        )
    if len(classes) - count < LEAST_CLASSES:
        raise UserError(
            f"data.validation_fraction={config.validation_fraction} leaves "
            f"{max(0, len(classes) - count)} of {len(classes)} classes to train on, and "
            f"{LEAST_CLASSES} are needed: lower it"
        )
    rng = np.random.default_rng(config.split_seed)
    drawn = set(rng.choice(len(classes), count, replace=False).tolist())
    kept = [name for i, name in enumerate(classes) if i not in drawn]
    return kept, [classes[i] for i in sorted(drawn)]


def fold(
    count: int, config: DataConfig, least: int = LEAST_CLASSES, what: str = "classes"
) -> Int64[np.ndarray, "m"]:
    """Places of the classes that validate in this run of a cross-validation, ascending.

    The classes are divided in `config.folds` parts of about the same size, at random
    (`config.split_seed`); part `config.fold` validates, so that over all runs each class validates
    once (class-disjoint cross-validation: Musgrave et al. 2020, section 3.3).

    Args:
      count: number of classes that are not tested.
      least: classes that a part must have.
      what: their name in the error.

    Raises:
      UserError: the parts are too small.
    """
    if count // config.folds < least:
        raise UserError(
            f"data.folds={config.folds} divides {count} {what} in parts of {count // config.folds}"
            f", and {least} {'is' if least == 1 else 'are'} needed in each: lower it, or add {what}"
        )
    order = np.random.default_rng(config.split_seed).permutation(count)
    return np.sort(np.array_split(order, config.folds)[config.fold])


def held_out_text(count: int, config: DataConfig) -> str:
    """The part of a protocol sentence that tells of `hold_out`."""
    if config.folds:
        return (
            f"{count} of them, fold {config.fold} of {config.folds} with "
            f"data.split_seed={config.split_seed}, validate"
        )
    return f"{count} of them, drawn with data.split_seed={config.split_seed}, validate"


def assemble(
    name: str,
    images: Sequence[RawImage],
    ids: Sequence[str],
    labels: Int64[np.ndarray, "n"],
    catalogue: Bool[np.ndarray, "n"],
    sizes: Sequence[int],
    class_names: Sequence[str],
    split_of_class: dict[int, str],
    protocol: str,
    skipped: Sequence[str] = (),
    gallery: Bool[np.ndarray, "n"] | None = None,
) -> Dataset:
    """Cuts one pool of images into the three splits; images of other classes are left out.

    Args:
      sizes: bytes of each encoded image, for the fingerprint.
      split_of_class: class id -> "train", "validation" or "test".
      gallery: whether an image is searched or a query, for the test split of sets that say so.
        A class may then be in the gallery alone.

    Raises:
      UserError: a split with fewer than two classes, or a class with fewer than two images.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    parts = {}
    pool = ImageSet(images, labels, tuple(ids), catalogue, gallery)
    for split in (TRAIN, VALIDATION, TEST):
        classes = [c for c, place in split_of_class.items() if place == split]
        if len(classes) < LEAST_CLASSES:
            raise UserError(
                f"{name}: {len(classes)} {split} classes, and at least {LEAST_CLASSES} are needed"
            )
        for c in classes:
            if counts[c] < LEAST_PICTURES and (gallery is None or split != TEST):
                raise UserError(
                    f"{name}: class {class_names[c]!r} has {counts[c]} readable "
                    f"{'image' if counts[c] == 1 else 'images'}, and at least {LEAST_PICTURES} "
                    "are needed in every class: add some, or remove the class"
                    + "".join(f"; {line}" for line in skipped[:SHOWN])
                )
        parts[split] = pool.subset(np.flatnonzero(np.isin(labels, classes)))
        if split != TEST:
            parts[split] = dataclasses.replace(parts[split], gallery=None)
    searched = np.zeros(len(ids), bool) if gallery is None else gallery
    rows = [
        (image, int(label), split_of_class[int(label)] + "/gallery" * bool(place), size)
        for image, label, place, size in zip(ids, labels, searched, sizes, strict=True)
        if int(label) in split_of_class
    ]
    return Dataset(
        name=name,
        **parts,
        class_names=tuple(class_names),
        protocol=protocol,
        fingerprint=fingerprint(rows),
        test_fingerprint=fingerprint(row for row in rows if row[2].startswith(TEST)),
        skipped=tuple(skipped),
    )
