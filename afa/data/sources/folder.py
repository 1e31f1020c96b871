"""Custom data: a directory of class folders, or of split folders that hold class folders."""

import difflib
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from afa.config import DataConfig
from afa.data.listing import (
    BROKEN,
    FORMAT,
    UNREADABLE,
    Found,
    class_name,
    images_under,
    near_equal,
    summary,
)
from afa.data.readable import readable
from afa.data.splits import (
    LEAST_CLASSES,
    TEST,
    TRAIN,
    VALIDATION,
    assemble,
    halves,
    held_out_text,
    hold_out,
)
from afa.data.types import Dataset, Files
from afa.errors import UserError, printable
from afa.io import expanded

CATALOGUE, QUERY, GALLERY = "catalogue", "query", "gallery"
SPLIT_FOLDERS = {
    "train": TRAIN,
    "val": VALIDATION,
    "valid": VALIDATION,
    "validation": VALIDATION,
    "test": TEST,
    "iconic": CATALOGUE,
    "catalogue": CATALOGUE,
    "gallery": CATALOGUE,
    "query": QUERY,
}

LEAST_HALVED = 4 * LEAST_CLASSES - 1  # classes: the larger half is for training and validation
NEAR = 0.65  # similarity from which a folder name counts as a misspelt split

Listing = dict[str, list[Path]]  # class name -> its image files


@dataclass
class Layout:
    """Contents of a directory.

    Attributes:
      parts: split ("" in a directory without split folders) -> class -> files.
      notes: one line per kind of path that is skipped or looks like a mistake.
    """

    parts: dict[str, Listing] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """The classes of each split, the folders of its images, and a sentence that describes both."""

    classes: dict[str, list[str]]
    sources: dict[str, list[Listing]]
    protocol: str


def load_folder(config: DataConfig) -> Dataset:
    """Loads the directory `config.path` as class-disjoint splits.

    `afa.data.listing` defines which files are images. Images in subfolders of a class folder belong
    to that class. Class names are compared in Unicode normal form C.

    Layouts:
      - CLASS/IMAGE: the first half of the sorted classes is for training, the rest for testing.
      - train/CLASS/IMAGE and test/CLASS/IMAGE: used as they are if they share no class. Otherwise
        the shared classes are halved as above; training classes take their images from train, test
        classes from test.
      - optional val (valid, validation) for validation classes, and iconic (catalogue, gallery)
        for catalogue images, which are added to their class and marked.
      - query and gallery instead of test: queries are searched in the gallery. A class may be in
        one of them alone.
    Part of the training classes is held out for validation unless val provides them.

    Raises:
      UserError: missing or empty directory or split, too few classes, a class with one image, or
        more unreadable images than `config.max_unreadable` allows.
    """
    root = expanded("data.path", config.path).absolute()
    layout = _layout(root, config)
    parts = layout.parts
    in_gallery = {path for files in parts.get(GALLERY, {}).values() for path in files}
    plan = _plan(parts, config)
    entries = []
    for split, names in plan.classes.items():
        for name in names:
            found = [path for source in plan.sources[split] for path in source.get(name, [])]
            clean = parts.get(CATALOGUE, {}).get(name, [])
            entries += [(path, name, False) for path in found]
            entries += [(path, name, True) for path in clean]
    split_of = {name: split for split, names in plan.classes.items() for name in names}
    ids = [path.relative_to(root).as_posix() for path, _, _ in entries]
    kept, skipped = readable([path for path, _, _ in entries], ids, config)
    entries = [entries[i] for i in kept]
    class_names = sorted(split_of)
    number_of = {name: i for i, name in enumerate(class_names)}
    return assemble(
        root.resolve().name,
        Files(str(path) for path, _, _ in entries),
        [ids[i] for i in kept],
        np.array([number_of[name] for _, name, _ in entries], np.int64),
        np.array([clean for _, _, clean in entries], bool),
        [path.stat().st_size for path, _, _ in entries],
        class_names,
        {number_of[name]: split for name, split in split_of.items()},
        plan.protocol,
        [*layout.notes, *skipped],
        np.array([path in in_gallery for path, _, _ in entries], bool) if in_gallery else None,
    )


def _layout(root: Path, config: DataConfig) -> Layout:
    """Finds the splits and their classes.

    Raises:
      UserError: no directory, no images, or an incomplete layout of split folders.
    """
    option = f"data.path={config.path!r}"
    if not config.path:
        raise UserError("data.path is empty, and data.name='folder' needs a directory")
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise UserError(f"{option} {what}")
    folders = _subfolders(root)
    meanings = _splits(folders, option)
    layout = Layout()
    if meanings:
        others = [(folder,) for folder in folders if folder not in meanings]
        notes = [summary("folders that are not splits and are not read", others)]
        layout.notes += notes if others else []
        for folder, split in meanings.items():
            classes = class_files(root / folder)
            layout.notes += [f"{folder}/: {line}" for line in classes.notes]
            listing = layout.parts.setdefault(split, {})
            for name, files in classes.parts[""].items():
                listing.setdefault(name, []).extend(files)
    else:
        layout = class_files(root)
    if not any(_images(listing) for part, listing in layout.parts.items() if part != CATALOGUE):
        raise UserError(
            f"{option} contains no class folders with images (expected DIR/CLASS/IMAGE, or "
            "DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE)"
            + "".join(f"; {line}" for line in layout.notes)
        )
    for folder, split in meanings.items():
        if not _images(layout.parts[split]):
            raise UserError(f"{option}: {folder}/ contains no class folders with images")
    if QUERY in layout.parts:
        layout.parts[TEST] = _merged(layout.parts[QUERY], layout.parts[GALLERY])
    near = near_equal({name for listing in layout.parts.values() for name in listing})
    layout.notes += [
        f"classes {printable(a)!r} and {printable(b)!r} differ only in case, blanks or dashes, and"
        " count as two"
        for a, b in near
    ]
    return layout


def _splits(folders: Collection[str], option: str) -> dict[str, str]:
    """Returns folder -> split if the folders of a directory are splits, otherwise {}.

    Raises:
      UserError: an incomplete layout, or a folder whose name resembles that of a split.
    """
    meanings = dict(SPLIT_FOLDERS)
    known = {folder.lower() for folder in folders} & meanings.keys()
    others = [folder for folder in folders if folder.lower() not in known]
    if known and not others and "train" not in known:
        raise UserError(
            f"{option} holds {', '.join(f'{each}/' for each in folders)} without train/"
        )
    near = {
        other: match[0]
        for other in others
        if (match := difflib.get_close_matches(other.lower(), meanings, n=1, cutoff=NEAR))
    }
    layout = "train" in known and (known & {"test", "query"} or not others)
    if "train" in known and near and (layout or len(near) == len(others)):
        other, match = next(iter(near.items()))
        raise UserError(
            f"{option} holds train/ and {printable(other)}/, which is none of "
            f"{', '.join(f'{each}/' for each in meanings)}; did you mean {match}/?"
        )
    if not layout:
        return {}
    if "query" in known:
        if "gallery" not in known or "test" in known:
            raise UserError(
                f"{option} holds query/ {'and test/' if 'test' in known else 'without gallery/'}"
                " (expected train/, query/ and gallery/)"
            )
        meanings["gallery"] = GALLERY
    return {folder: meanings[folder.lower()] for folder in folders if folder.lower() in known}


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None


def class_files(folder: Path) -> Layout:
    """Lists the classes of a folder, and what was skipped.

    A class whose images were all skipped is kept without images, so that its use is an error.

    Raises:
      UserError: the folder cannot be read, or all images are in subfolders of class folders.
    """
    found = images_under(folder)
    listing: Listing = {}
    for parts, path in zip(found.files, found.paths, strict=True):
        if len(parts) > 1:
            listing.setdefault(class_name(parts[0]), []).append(path)
    deeper = [parts for parts in found.files if len(parts) > 2]
    if deeper and len(deeper) == sum(len(files) for files in listing.values()):
        raise UserError(
            f"{folder}: no image directly in a class folder, all are in subfolders, such as "
            f"{printable('/'.join(deeper[0]))} (expected CLASS/IMAGE)"
        )
    lines = [*found.summaries(), *_remarks(found, deeper)]
    for reason in (FORMAT, BROKEN, UNREADABLE):
        for parts in found.skipped.get(reason, ()):
            if len(parts) > 1 or (parts and reason == UNREADABLE):
                listing.setdefault(class_name(parts[0]), [])
    return Layout({"": dict(sorted(listing.items()))}, lines)


def _remarks(found: Found, deeper: list[tuple[str, ...]]) -> list[str]:
    """Returns lines on images in unexpected folders, and on folders without images."""
    outside = [parts for parts in found.files if len(parts) == 1]
    having = {parts[0] for parts in found.files}
    having |= {parts[0] for names in found.skipped.values() for parts in names if parts}
    empty = [(name,) for name in sorted(found.folders) if name not in having]
    return [
        summary(what, names)
        for what, names in (
            ("images outside class folders, which are skipped", outside),
            ("images in subfolders of a class folder, which belong to that class", deeper),
            ("folders without images", empty),
        )
        if names
    ]


def _images(listing: Listing) -> bool:
    return any(listing.values())


def _merged(first: Listing, second: Listing) -> Listing:
    return {name: first.get(name, []) + second.get(name, []) for name in sorted({*first, *second})}


def _plan(parts: dict[str, Listing], config: DataConfig) -> Plan:
    train = parts.get(TRAIN, parts.get("", {}))
    test = parts.get(TEST, train)
    folder = "query/ and gallery/" if QUERY in parts else "test/"
    shared = sorted(train.keys() & test.keys())
    first, last = halves(shared)
    training = sorted({*first, *(train.keys() - test.keys())})
    testing = sorted({*last, *(test.keys() - train.keys())})
    if not shared:
        how = f"split folders as given: {len(training)} classes of train/ train"
    elif TEST in parts:
        how = (
            f"train/ and {folder} share {len(shared)} classes; sorted by name, the first "
            f"{len(first)} train with their images of train/"
        )
    else:
        how = f"of {len(shared)} classes sorted by name the first {len(first)} train"
    sources = {TRAIN: [train], VALIDATION: [train], TEST: [test]}
    own = parts.get(VALIDATION, {})
    own_validation = bool(own) and not own.keys() & {*training, *testing}
    if TEST not in parts and not own_validation and not config.folds and len(train) < LEAST_HALVED:
        raise UserError(
            f"data.path={config.path!r} holds {len(train)} "
            f"{'class' if len(train) == 1 else 'classes'}, and at least {LEAST_HALVED} are needed: "
            f"half of them test, and of the others {LEAST_CLASSES} train and {LEAST_CLASSES} "
            "validate"
        )
    if own_validation and config.folds:  # the folds divide them too
        training = sorted({*training, *own})
        sources[TRAIN] = sources[VALIDATION] = [train, own]
        how += f" with {len(own)} of the validation folder"
    if own_validation and not config.folds:
        validation, sources[VALIDATION] = sorted(own), [own]
        val_text = f"{len(validation)} other classes of the validation folder validate"
    else:
        training, validation = hold_out(training, config)
        val_text = held_out_text(len(validation), config)
        if own and not own_validation:
            sources[VALIDATION].append(own)
            val_text += " with their images of the validation folder too"
    rest = f"the {'last ' if shared else ''}{len(testing)} test"
    if TEST in parts:
        rest += f" with their images of {folder}" if shared else f" ({folder})"
    protocol = f"class-disjoint: {how} ({val_text}), {rest}"
    if CATALOGUE in parts:
        protocol += "; catalogue images join their class"
    return Plan({TRAIN: training, VALIDATION: validation, TEST: testing}, sources, protocol)
