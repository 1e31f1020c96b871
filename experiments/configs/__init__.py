"""Experiments, one file each, found by themselves: `python -m experiments.run --exp=list`.

An experiment's file opens with its purpose (first line), command, hardware, wall time and expected
figures, and defines `config(laptop) -> ExperimentConfig`.
"""

import importlib
import pkgutil
from collections.abc import Callable

from afa.config import ExperimentConfig
from afa.errors import choose

COMMANDS = (
    "cli", "run", "search", "compare", "rerank", "weights", "benchmark", "throughput", "torch_twin",
    "torch_zoo", "package", "evaluate", "index", "search_benchmark", "search_engines",
)  # fmt: skip


def names() -> list[str]:
    """Every experiment, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in COMMANDS)


def find(name: str) -> Callable[[bool], ExperimentConfig]:
    """The `config` function of an experiment.

    Raises:
      UserError: no such experiment; the nearest is named.
    """
    choose("exp", name, dict.fromkeys(names()))
    return importlib.import_module(f"{__name__}.{name}").config


def purpose(name: str) -> str:
    """The first line of an experiment's file."""
    return (importlib.import_module(f"{__name__}.{name}").__doc__ or "").partition("\n")[0]
