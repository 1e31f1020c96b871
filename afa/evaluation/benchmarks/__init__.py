"""Public benchmarks: queries, gallery and metrics of each.

A new benchmark is one file and one line of `BENCHMARKS`.
"""

import filecmp
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from afa.data.types import Files, ImageSet
from afa.errors import UserError, choose
from afa.evaluation.benchmarks.contract import Benchmark

TAIL_BYTES = 64  # last bytes of a file, compared before whole files are

# Benchmark -> module and function; a module is imported when its benchmark is loaded.
BENCHMARKS = {
    "folder": ("classes", "load_folder"),
    "gldv2": ("gldv2", "load_retrieval"),
    "gldv2_recognition": ("gldv2", "load_recognition"),
    "inshop": ("classes", "load_inshop"),
    "roxford5k": ("revisited", "load_revisited"),
    "rparis6k": ("revisited", "load_revisited"),
}


def load(name: str, root: Path, distractors: Sequence[Path] = ()) -> Benchmark:
    """Reads the lists of a benchmark; images are read later.

    Args:
      name: a key of `BENCHMARKS`.
      root: directory of the benchmark.
      distractors: extra gallery images that are never positives.

    Raises:
      UserError: no such benchmark, missing or malformed lists or images, or distractors that are
        images of the benchmark itself.
    """
    module, function = choose("--benchmark", name, BENCHMARKS)
    loader = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    benchmark: Benchmark = loader(name, root, distractors)
    for part, images in (("queries", benchmark.queries), ("gallery", benchmark.gallery)):
        if not len(images):
            raise UserError(f"{root}: {name} has no {part}")
    if distractors:
        gallery = _files(benchmark.gallery)[: -len(distractors)]
        _refuse_known([str(path) for path in distractors], [*gallery, *_files(benchmark.queries)])
    return benchmark


def _files(images: ImageSet) -> Sequence[str]:
    files = getattr(images.images, "files", images.images)  # `Cropped` keeps its files
    return files.paths if isinstance(files, Files) else ()


def _refuse_known(distractors: Sequence[str], known: Sequence[str]) -> None:
    """Refuses distractors that are images of the benchmark: positives would count as wrong.

    Raises:
      UserError: names the first distractor that is such an image, or a copy of one.
    """
    alike: dict[tuple[int, bytes] | None, list[str]] = {}
    for path in known:
        alike.setdefault(_key(path), []).append(path)
    alike.pop(None, None)
    same = [
        (path, original)
        for path in distractors
        for original in alike.get(_key(path), ())
        if filecmp.cmp(path, original, shallow=False)
    ]
    if same:
        raise UserError(
            f"--distractors: {len(dict(same))} of {len(distractors)} are images of the benchmark,"
            f" and would never count as right: {same[0][0]} is {same[0][1]}; leave them out"
        )


def _key(path: str) -> tuple[int, bytes] | None:
    """Size and last bytes of a file, to find candidates for copies without reading whole files."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (a million of them)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return size, file.read()
    except OSError:
        return None
