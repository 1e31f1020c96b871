"""Images of one's own: a directory of class folders, or of splits of class folders."""

import difflib
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from afa.config import DataConfig
from afa.data.listing import (
    CLOSED,
    FORMAT,
    NOWHERE,
    Found,
    class_name,
    images_under,
    near_equal,
    told,
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

LEAST_HALVED = 4 * LEAST_CLASSES - 1  # classes of which the larger half trains and validates
NEAR = 0.65  # likeness from which a folder's name is taken for a misspelt split

Listing = dict[str, list[Path]]  # class name -> its image files


@dataclass
class Layout:
    """What a directory holds.

    Attributes:
      parts: split ("" for all of a plain directory) -> class -> files.
      told: a line for each kind of thing that is left out or that looks like a mistake.
    """

    parts: dict[str, Listing] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """Which classes a split has, where its images come from, and the sentence that says so."""

    classes: dict[str, list[str]]
    sources: dict[str, list[Listing]]
    protocol: str


def load_folder(config: DataConfig) -> Dataset:
    """Reads `config.path`, class-disjoint whatever its layout.

    Which files are images says `afa.data.listing`. An image deeper than its class folder is of that
    class. Names of classes are compared as composed Unicode.

    A directory of class folders: the first half of the classes in sorted order trains, the rest
    tests. Folders train, test and perhaps val (validation) and iconic (catalogue, gallery), each
    of class folders: used as they are when train and test share no class; otherwise the shared
    classes are halved likewise, training classes keep their images of train and test classes
    those of test. Part of the training classes is held out for validation. Catalogue images join
    their class, marked as such. Folders query and gallery in place of test: the images of the one
    are searched among those of the other, where a class may be in one of them alone.

    Raises:
      UserError: no such directory, nothing in it or in one of its splits, too few classes, a class
        with one image, or more unreadable images than `config.max_unreadable` allows.
    """
    root = expanded("data.path", config.path).absolute()
    layout = _layout(root, config)
    parts = layout.parts
    searched = {path for files in parts.get(GALLERY, {}).values() for path in files}
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
        [*layout.told, *skipped],
        np.array([path in searched for path, _, _ in entries], bool) if searched else None,
    )


def _layout(root: Path, config: DataConfig) -> Layout:
    """Finds the splits and their classes.

    Raises:
      UserError: no directory, no images, or folders that are half a layout.
    """
    where = f"data.path={config.path!r}"
    if not config.path:
        raise UserError("data.path is empty, and data.name='folder' needs a directory")
    if not root.is_dir():
        raise UserError(f"{where} is no directory" if root.exists() else f"{where} does not exist")
    folders = _subfolders(root)
    meanings = _splits(folders, where)
    layout = Layout()
    if meanings:
        others = [(folder,) for folder in folders if folder not in meanings]
        layout.told += [told("folders beside the splits that are not read", others)] * bool(others)
        for folder, split in meanings.items():
            classes = class_files(root / folder)
            layout.told += [f"{folder}/: {line}" for line in classes.told]
            listing = layout.parts.setdefault(split, {})
            for name, files in classes.parts[""].items():
                listing.setdefault(name, []).extend(files)
    else:
        layout = class_files(root)
    if not any(_images(listing) for part, listing in layout.parts.items() if part != CATALOGUE):
        raise UserError(
            f"{where} holds no class folders with images (expected DIR/CLASS/IMAGE, or "
            "DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE)"
            + "".join(f"; {line}" for line in layout.told)
        )
    for folder, split in meanings.items():
        if not _images(layout.parts[split]):
            raise UserError(f"{where}: {folder}/ holds no class folders with images")
    if QUERY in layout.parts:
        layout.parts[TEST] = _merged(layout.parts[QUERY], layout.parts[GALLERY])
    near = near_equal({name for listing in layout.parts.values() for name in listing})
    layout.told += [
        f"classes {printable(a)!r} and {printable(b)!r} differ in case, blanks or dashes alone, and"
        " count as two"
        for a, b in near
    ]
    return layout


def _splits(folders: Collection[str], where: str) -> dict[str, str]:
    """Folder -> split, where the folders of a directory are splits, not classes.

    Raises:
      UserError: half a layout, or a folder whose name is nearly that of a split.
    """
    meanings = dict(SPLIT_FOLDERS)
    known = {folder.lower() for folder in folders} & meanings.keys()
    others = [folder for folder in folders if folder.lower() not in known]
    if known and not others and "train" not in known:
        raise UserError(f"{where} holds {', '.join(f'{each}/' for each in folders)} without train/")
    near = {
        other: match[0]
        for other in others
        if (match := difflib.get_close_matches(other.lower(), meanings, n=1, cutoff=NEAR))
    }
    layout = "train" in known and (known & {"test", "query"} or not others)
    if "train" in known and near and (layout or len(near) == len(others)):
        other, match = next(iter(near.items()))
        raise UserError(
            f"{where} holds train/ and {printable(other)}/, which is none of "
            f"{', '.join(f'{each}/' for each in meanings)}; did you mean {match}/?"
        )
    if not layout:
        return {}
    if "query" in known:
        if "gallery" not in known or "test" in known:
            raise UserError(
                f"{where} holds query/ {'beside test/' if 'test' in known else 'without gallery/'}"
                " (expected train/, query/ and gallery/)"
            )
        meanings["gallery"] = GALLERY
    return {folder: meanings[folder.lower()] for folder in folders if folder.lower() in known}


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: may not be read ({error.strerror})") from None


def class_files(folder: Path) -> Layout:
    """The classes of one folder, and what of it is left out.

    A class all of whose images are left out stays, with none: it is refused where it is used.

    Raises:
      UserError: no folder that may be read, or no image in a class folder but all of them deeper.
    """
    found = images_under(folder)
    listing: Listing = {}
    for parts, path in zip(found.files, found.paths, strict=True):
        if len(parts) > 1:
            listing.setdefault(class_name(parts[0]), []).append(path)
    deeper = [parts for parts in found.files if len(parts) > 2]
    if deeper and len(deeper) == sum(len(files) for files in listing.values()):
        raise UserError(
            f"{folder}: no image lies in a class folder, all lie deeper, such as "
            f"{printable('/'.join(deeper[0]))} (expected CLASS/IMAGE)"
        )
    lines = [*found.told(), *_remarks(found, deeper)]
    for why in (FORMAT, NOWHERE, CLOSED):
        for parts in found.left_out.get(why, ()):
            if len(parts) > 1 or (parts and why == CLOSED):
                listing.setdefault(class_name(parts[0]), [])
    return Layout({"": dict(sorted(listing.items()))}, lines)


def _remarks(found: Found, deeper: list[tuple[str, ...]]) -> list[str]:
    """Lines on images that are not where one expects them, and on folders without any."""
    beside = [parts for parts in found.files if len(parts) == 1]
    having = {parts[0] for parts in found.files}
    having |= {parts[0] for names in found.left_out.values() for parts in names if parts}
    empty = [(name,) for name in sorted(found.folders) if name not in having]
    return [
        told(what, names)
        for what, names in (
            ("images beside the class folders, which are left out", beside),
            ("images below folders within a class folder, which count as of that class", deeper),
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
        how = f"as the folders are: {len(training)} classes of train/ train"
    elif TEST in parts:
        how = (
            f"train/ and {folder} share {len(shared)} classes; sorted by name, the first "
            f"{len(first)} train with their images of train/"
        )
    else:
        how = f"of {len(shared)} classes sorted by name the first {len(first)} train"
    sources = {TRAIN: [train], VALIDATION: [train], TEST: [test]}
    own = parts.get(VALIDATION, {})
    apart = bool(own) and not own.keys() & {*training, *testing}
    if TEST not in parts and not apart and not config.folds and len(train) < LEAST_HALVED:
        raise UserError(
            f"data.path={config.path!r} holds {len(train)} "
            f"{'class' if len(train) == 1 else 'classes'}, and at least {LEAST_HALVED} are needed: "
            f"half of them test, and of the others {LEAST_CLASSES} train and {LEAST_CLASSES} "
            "validate"
        )
    if apart and config.folds:  # they are of those that are divided
        training = sorted({*training, *own})
        sources[TRAIN] = sources[VALIDATION] = [train, own]
        how += f" with {len(own)} of the validation folder"
    if apart and not config.folds:
        validation, sources[VALIDATION] = sorted(own), [own]
        held = f"{len(validation)} other classes of the validation folder validate"
    else:
        training, validation = hold_out(training, config)
        held = held_out_text(len(validation), config)
        if own and not apart:
            sources[VALIDATION].append(own)
            held += " with their images of the validation folder too"
    rest = f"the {'last ' if shared else ''}{len(testing)} test"
    if TEST in parts:
        rest += f" with their images of {folder}" if shared else f" ({folder})"
    protocol = f"class-disjoint: {how} ({held}), {rest}"
    if CATALOGUE in parts:
        protocol += "; catalogue images join their class"
    return Plan({TRAIN: training, VALIDATION: validation, TEST: testing}, sources, protocol)
