"""Class-disjoint splits: training, validation and test share no class."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int64

from afa.config import DataConfig
from afa.data.types import Dataset, ImageSet, RawImage, fingerprint
from afa.errors import UserError

LEAST_CLASSES = 2  # per split: with one class every answer is correct
LEAST_IMAGES = 2  # per class: a query and a positive

SHOWN = 3  # lines on skipped files that an error repeats

TRAIN, VALIDATION, TEST = "train", "validation", "test"

Class = TypeVar("Class", str, int)  # class name or class id


def halves(classes: Sequence[Class]) -> tuple[list[Class], list[Class]]:
    """Returns the first half of the sorted classes, rounded up, and the rest."""
    ordered = sorted(classes)
    middle = (len(ordered) + 1) // 2
    return ordered[:middle], ordered[middle:]


def hold_out(classes: Sequence[Class], config: DataConfig) -> tuple[list[Class], list[Class]]:
    """Splits classes into training and validation classes, both in the given order.

    Draws a random `config.validation_fraction` of the classes, rounded, with `config.split_seed`;
    at least two. With `config.folds`, one fold validates instead (see `fold`).

    Raises:
      UserError: a split would have fewer than two classes.
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
    """Returns the indices of the validation classes of a cross-validation fold, ascending.

    The classes are split at random (`config.split_seed`) into `config.folds` folds of about equal
    size; fold `config.fold` is used for validation (class-disjoint cross-validation, Musgrave et
    al. 2020, section 3.3).

    Args:
      count: number of training and validation classes.
      least: smallest allowed number of classes per fold.
      what: what is counted, for the error message.

    Raises:
      UserError: the folds are too small.
    """
    if count // config.folds < least:
        raise UserError(
            f"data.folds={config.folds} splits {count} {what} into folds of {count // config.folds}"
            f", and {least} {'is' if least == 1 else 'are'} needed in each: lower it, or add {what}"
        )
    order = np.random.default_rng(config.split_seed).permutation(count)
    return np.sort(np.array_split(order, config.folds)[config.fold])


def held_out_text(count: int, config: DataConfig) -> str:
    """Returns the part of a protocol sentence that describes `hold_out`."""
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
    """Splits a pool of images by class; images of classes in no split are dropped.

    Args:
      ids, labels, catalogue: see `ImageSet`, one per image.
      sizes: size of each encoded image in bytes, for the fingerprint.
      split_of_class: class id -> "train", "validation" or "test".
      protocol, skipped: see `Dataset`.
      gallery: True for gallery images, False for queries; only the test split uses it. A test class
        may then have gallery images alone.

    Raises:
      UserError: a split with fewer than two classes, or a class with fewer than two images.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    parts = {}
    pool = ImageSet(images, labels, tuple(ids), catalogue, gallery)
    for split in (TRAIN, VALIDATION, TEST):
        classes = [c for c, its_split in split_of_class.items() if its_split == split]
        if len(classes) < LEAST_CLASSES:
            raise UserError(
                f"{name}: {len(classes)} {split} classes, and at least {LEAST_CLASSES} are needed"
            )
        for c in classes:
            if counts[c] < LEAST_IMAGES and (gallery is None or split != TEST):
                raise UserError(
                    f"{name}: class {class_names[c]!r} has {counts[c]} readable "
                    f"{'image' if counts[c] == 1 else 'images'}, and at least {LEAST_IMAGES} "
                    "are needed in every class: add some, or remove the class"
                    + "".join(f"; {line}" for line in skipped[:SHOWN])
                )
        subset = pool.subset(np.flatnonzero(np.isin(labels, classes)))
        parts[split] = subset if split == TEST else dataclasses.replace(subset, gallery=None)
    in_gallery = np.zeros(len(ids), bool) if gallery is None else gallery
    rows = [
        (image, int(label), split_of_class[int(label)] + "/gallery" * bool(is_gallery), size)
        for image, label, is_gallery, size in zip(ids, labels, in_gallery, sizes, strict=True)
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
