"""Checks which image files can be decoded. A few unreadable ones are skipped; many are an error."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from afa.config import DataConfig
from afa.console import track
from afa.data.images import UnreadableImage, decode
from afa.errors import UserError

PROGRESS_FROM = 5000  # images; checking fewer is too quick for a progress bar
SHOWN = 3  # unreadable images named in the error
MOST_THREADS = 16  # unless more are asked for; every one keeps batches in memory


def readable(
    paths: Sequence[Path], ids: Sequence[str], config: DataConfig
) -> tuple[list[int], list[str]]:
    """Returns the indices of the images that decode completely, and "id: reason" of the others.

    Raises:
      UserError: more unreadable images than `config.max_unreadable` allows.
    """
    reasons = why_not(paths, reading_threads(config.read_threads))
    skipped = [f"{name}: {reason}" for name, reason in zip(ids, reasons, strict=True) if reason]
    _refuse_too_many(skipped, len(paths), config)
    return [i for i, reason in enumerate(reasons) if not reason], skipped


def reading_threads(requested: int = 0) -> int:
    """Number of threads that read images: the requested one, or for 0 one per available core."""
    if requested:
        return requested
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return min(len(affinity(0)) if affinity else os.cpu_count() or 1, MOST_THREADS)


def why_not(paths: Sequence[Path], threads: int) -> list[str]:
    """Returns for each image why it cannot be decoded, or "" if it can."""
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(_reason, paths)
        return list(track(reasons, "checking images", len(paths), PROGRESS_FROM))


_checked: dict[tuple[str, int, int], str] = {}  # (path, size, mtime) -> reason, "" if readable


def _reason(path: Path) -> str:
    """Returns why an image cannot be decoded, or "" if it can."""
    try:
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns)
        if key not in _checked:
            try:
                decode(path.read_bytes())
                _checked[key] = ""
            except UnreadableImage as error:
                _checked[key] = str(error)
        return _checked[key]
    except OSError as error:
        return error.strerror or str(error)


def _refuse_too_many(skipped: Sequence[str], total: int, config: DataConfig) -> None:
    if len(skipped) <= config.max_unreadable * total:
        return
    more = f", and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    raise UserError(
        f"data.path={config.path!r}: {len(skipped)} of {total} images "
        f"({len(skipped) / total:.1%}) cannot be read, above "
        f"data.max_unreadable={config.max_unreadable}: {', '.join(skipped[:SHOWN])}{more}"
    )
