"""A folder of images as rows of a gallery."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from afa.data.readable import SHOWN, why_not
from afa.data.sources.folder import SUFFIXES
from afa.data.types import Files, ImageSet
from afa.errors import UserError
from afa.inference.load import Trained
from afa.retrieval.records import Records

CHUNK = 1024  # images that are described between two lines of progress

Note = Callable[[str], None]


def described(trained: Trained, root: Path, note: Note) -> Records:
    """Every image under a folder: its path within is its id, the folder it lies in its class.

    Args:
      trained: of a run.
      root: read with all folders below.
      note: is told of progress, and of images that cannot be read and are left out.

    Raises:
      UserError: no folder, or no image in it that can be read.
    """
    paths = _readable(files_under(root), root, note)
    if not paths:
        raise UserError(f"{root}: holds no images that can be read")
    ids = [path.relative_to(root).as_posix() for path in paths]
    vectors = []
    for begin in range(0, len(paths), CHUNK):
        part = paths[begin : begin + CHUNK]
        count = len(part)
        images = ImageSet(
            Files(str(path) for path in part),
            np.zeros(count, np.int64),
            tuple(ids[begin : begin + count]),
            np.zeros(count, bool),
        )
        vectors.append(trained(images))
        note(f"described {begin + count} of {len(paths)} images")
    classes = [path.parent.name if path.parent != root else "" for path in paths]
    places = [str(path.absolute()) for path in paths]
    return Records.of(np.concatenate(vectors), ids, classes, places)


def ids_under(root: Path) -> list[str]:
    """The ids that the images of a folder get.

    Raises:
      UserError: as `files_under`.
    """
    return [path.relative_to(root).as_posix() for path in files_under(root)]


def files_under(root: Path) -> list[Path]:
    """Image files in a folder and all folders below, by name.

    Raises:
      UserError: no such folder, or no images in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: is no directory" if root.exists() else f"{root}: does not exist")
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"{root}: holds no images")
    return found


def _readable(paths: list[Path], root: Path, note: Note) -> list[Path]:
    reasons = why_not(paths, os.cpu_count() or 1)
    bad = [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
    for path, reason in bad[:SHOWN]:
        note(f"left out {path.relative_to(root)}: {reason}")
    if len(bad) > SHOWN:
        note(f"left out {len(bad)} images that cannot be read")
    return [path for path, reason in zip(paths, reasons, strict=True) if not reason]
