"""Finds, reads and checks the image lists of public data sets."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from afa.config import DataConfig
from afa.data.readable import readable
from afa.data.splits import assemble
from afa.data.types import Dataset, Files
from afa.errors import UserError
from afa.io import expanded

File = str | Path
DECODED = 200_000  # images; images of longer lists are only checked to exist, not decoded
SHOWN = 3  # missing images named in the error
THREADS = 16  # that stat files, which may be on a slow disk


def directory(field: str, value: str | Path) -> Path:
    """Returns the directory given by an option.

    Args:
      field: name of the option, for errors.

    Raises:
      UserError: the value is empty, or is not an existing directory.
    """
    root = expanded(field, value).absolute()
    if not str(value):
        raise UserError(f"{field} is empty, and a directory is needed")
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise UserError(f"{field}={str(value)!r} {what}")
    return root


def find(root: Path, names: Sequence[str], what: str) -> Path:
    """Returns the first existing path among several candidates.

    Args:
      names: candidates, relative to `root`.
      what: description of the file or folder, for the error.

    Raises:
      UserError: none exists.
    """
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(f"{root / names[0]} is missing: {what}")


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yields the given columns of a CSV file with a header, row by row.

    Raises:
      UserError: the file cannot be read, lacks a column, or has a row with too few columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            missing = [name for name in columns if name not in header]
            if missing:
                raise UserError(
                    f"{path}: has no column {missing[0]!r} (its first line is "
                    f"{','.join(header)[:80]!r}, expected {','.join(columns)})"
                )
            indices = [header.index(name) for name in columns]
            for row in reader:
                if len(row) <= max(indices):
                    raise UserError(f"{path}: line {reader.line_num} has too few columns")
                yield tuple(row[i] for i in indices)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None


def require(paths: Sequence[File], listed_in: Path) -> list[int]:
    """Returns the sizes in bytes of the images of a list.

    Raises:
      UserError: images are missing or empty; the message has their number and the first few.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(_size, paths, chunksize=256))
    missing = [path for path, size in zip(paths, sizes, strict=True) if size <= 0]
    if missing:
        more = f", and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise UserError(
            f"{len(missing)} of the {len(paths)} images of {listed_in} are missing or empty: "
            f"{', '.join(map(str, missing[:SHOWN]))}{more}"
        )
    return sizes


def dataset(
    config: DataConfig,
    listed_in: Path,
    paths: Sequence[File],
    ids: Sequence[str],
    labels: Int64[np.ndarray, "n"],
    class_names: Sequence[str],
    split_classes: Mapping[str, Sequence[int]],
    protocol: str,
    gallery: Bool[np.ndarray, "n"] | None = None,
) -> Dataset:
    """Returns the three splits of a list; unreadable images are skipped.

    Args:
      listed_in: path of the list, for errors.
      labels: class ids, indices into `class_names`.
      split_classes: split -> its class ids; images of other classes are dropped.
      protocol, gallery: see `afa.data.splits.assemble`.

    Raises:
      UserError: images are missing, too many cannot be read, or a split has too few.
    """
    split_of_class = {c: split for split, classes in split_classes.items() for c in classes}
    chosen = np.flatnonzero(np.isin(labels, list(split_of_class))).tolist()
    sizes = require([paths[i] for i in chosen], listed_in)
    kept, skipped = list(range(len(chosen))), []
    if len(chosen) <= DECODED:
        names = [ids[i] for i in chosen]
        kept, skipped = readable([Path(paths[i]) for i in chosen], names, config)
    rows = [chosen[i] for i in kept]
    return assemble(
        config.name,
        Files(os.fspath(paths[i]) for i in rows),
        [ids[i] for i in rows],
        labels[rows],
        np.zeros(len(rows), bool),
        [sizes[i] for i in kept],
        class_names,
        split_of_class,
        protocol,
        skipped,
        None if gallery is None else gallery[rows],
    )


def _size(path: File) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (millions of them)
    except OSError:
        return 0
