"""Public benchmarks: which images ask, among which they are searched, and how answers are scored.

A new benchmark is one file and one line of the table.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path

from afa.errors import UserError, choose
from afa.evaluation.benchmarks.contract import Benchmark

# Module and function of each benchmark: only who needs one imports it.
BENCHMARKS = {
    "folder": ("classes", "load_folder"),
    "gldv2": ("gldv2", "load_retrieval"),
    "gldv2_recognition": ("gldv2", "load_recognition"),
    "inshop": ("classes", "load_inshop"),
    "roxford5k": ("revisited", "load_revisited"),
    "rparis6k": ("revisited", "load_revisited"),
}


def load(name: str, root: Path, distractors: Sequence[Path] = ()) -> Benchmark:
    """Reads the lists of a benchmark; no image is read yet.

    Args:
      root: the directory that holds it.
      distractors: further images that are searched and never right.

    Raises:
      UserError: no such benchmark, or lists or images of it that are missing or malformed.
    """
    module, function = choose("--benchmark", name, BENCHMARKS)
    loader = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    benchmark: Benchmark = loader(name, root, distractors)
    for part, images in (("queries", benchmark.queries), ("gallery", benchmark.gallery)):
        if not len(images):
            raise UserError(f"{root}: {name} has no {part}")
    return benchmark
