"""Images of one's own: a directory of class folders, or of splits of class folders."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afa.config import DataConfig
from afa.data.readable import readable
from afa.data.splits import TEST, TRAIN, VALIDATION, assemble, halves, held_out_text, hold_out
from afa.data.types import Dataset, Files
from afa.errors import UserError
from afa.io import expanded

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
)
CATALOGUE, QUERY, GALLERY = "catalogue", "query", "gallery"
SPLIT_FOLDERS = {
    "train": TRAIN,
    "val": VALIDATION,
    "validation": VALIDATION,
    "test": TEST,
    "iconic": CATALOGUE,
    "catalogue": CATALOGUE,
    "gallery": CATALOGUE,
    "query": QUERY,
}

Listing = dict[str, list[Path]]  # class name -> its image files


@dataclass(frozen=True)
class Plan:
    """Which classes a split has, where its images come from, and the sentence that says so."""

    classes: dict[str, list[str]]
    sources: dict[str, list[Listing]]
    protocol: str


def load_folder(config: DataConfig) -> Dataset:
    """Reads `config.path`, class-disjoint whatever its layout.

    A directory of class folders: the first half of the classes in sorted order trains, the rest
    tests. Folders train, test and perhaps val (validation) and iconic (catalogue, gallery), each
    of class folders: used as they are when train and test share no class; otherwise the shared
    classes are halved likewise, training classes keep their images of train and test classes
    those of test. Part of the training classes is held out for validation. Catalogue images join
    their class, marked as such. Folders query and gallery in place of test: the images of the one
    are searched among those of the other, where a class may be in one of them alone.

    Raises:
      UserError: no such directory, nothing in it, too few classes, a class with one image, or
        more unreadable images than `config.max_unreadable` allows.
    """
    root = expanded("data.path", config.path).absolute()
    parts = _layout(root, config)
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
        skipped,
        np.array([path in searched for path, _, _ in entries], bool) if searched else None,
    )


def _layout(root: Path, config: DataConfig) -> dict[str, Listing]:
    """Part ("" for all of a plain directory) -> class -> files."""
    field = f"data.path={config.path!r}"
    if not config.path:
        raise UserError("data.path is empty, and data.name='folder' needs a directory")
    if not root.is_dir():
        raise UserError(f"{field} is no directory" if root.exists() else f"{field} does not exist")
    folders = _subfolders(root)
    meanings = dict(SPLIT_FOLDERS)
    known = {folder.name.lower() for folder in folders} & meanings.keys()
    split_layout = "train" in known and (known & {"test", "query"} or len(known) == len(folders))
    if split_layout and "query" in known:
        if "gallery" not in known or "test" in known:
            raise UserError(
                f"{field} holds query/ {'beside test/' if 'test' in known else 'without gallery/'}"
                " (expected train/, query/ and gallery/)"
            )
        meanings["gallery"] = GALLERY
    parts: dict[str, Listing] = {}
    if split_layout:
        for folder in folders:
            if folder.name.lower() in known:
                listing = parts.setdefault(meanings[folder.name.lower()], {})
                for name, files in class_files(folder).items():
                    listing.setdefault(name, []).extend(files)
        if QUERY in parts:
            parts[TEST] = _merged(parts[QUERY], parts[GALLERY])
    else:
        parts[""] = class_files(root)
    if not any(listing for part, listing in parts.items() if part != CATALOGUE):
        raise UserError(
            f"{field} holds no class folders with images (expected DIR/CLASS/IMAGE, or "
            "DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE)"
        )
    return parts


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    return [folder / name for name in names]


def class_files(folder: Path) -> Listing:
    listing = {}
    for sub in _subfolders(folder):
        with os.scandir(sub) as entries:
            names = sorted(
                e.name
                for e in entries
                if os.path.splitext(e.name)[1].lower() in SUFFIXES  # noqa: PTH122 (much faster)
                and not e.name.startswith(".")
                and e.is_file()
            )
        if names:
            listing[sub.name] = [sub / name for name in names]
    return listing


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
