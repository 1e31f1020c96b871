"""Experiments, one file each, found by themselves: `python -m experiments.run --exp=list`.

An experiment's file opens with its purpose (first line), command, hardware, wall time and expected
figures, and defines `config(laptop) -> ExperimentConfig`. For every experiment `afa_X` there is a
baseline by rule: `baseline_X`, the same without the adversarial part.
"""

import importlib
import pkgutil
from collections.abc import Callable

from afa.config import ExperimentConfig, with_changes
from afa.errors import choose

METHOD, BASELINE = "afa_", "baseline_"


def names() -> list[str]:
    """Every experiment, sorted."""
    files = [module.name for module in pkgutil.iter_modules(__path__)]
    baselines = [BASELINE + x.removeprefix(METHOD) for x in files if x.startswith(METHOD)]
    return sorted([*files, *baselines])


def find(name: str) -> Callable[[bool], ExperimentConfig]:
    """The `config` function of an experiment.

    Raises:
      UserError: no such experiment; the nearest is named.
    """
    choose("exp", name, dict.fromkeys(names()))
    config = _module(name).config
    if not name.startswith(BASELINE):
        return config
    return lambda laptop: with_changes(config(laptop), **{"adversarial.enabled": False})


def purpose(name: str) -> str:
    """One line that says what an experiment is for."""
    if name.startswith(BASELINE):
        return f"The baseline of {_method(name)}: the same without the adversarial part."
    return (_module(name).__doc__ or "").partition("\n")[0]


def _method(name: str) -> str:
    return METHOD + name.removeprefix(BASELINE) if name.startswith(BASELINE) else name


def _module(name: str):
    return importlib.import_module(f"{__name__}.{_method(name)}")
