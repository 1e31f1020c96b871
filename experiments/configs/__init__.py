"""Experiments, one file each; `python -m experiments.run --exp=list` lists them.

The docstring of an experiment has its purpose (first line), command, hardware, wall time and
expected metrics. The file defines `config(laptop) -> ExperimentConfig`; it may also define
`sweep() -> {field: values}`, which `experiments.sweep --tune` tries. Every experiment `afa_X`
also defines its baseline `baseline_X`, the same without the adversarial part.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from afa.config import ExperimentConfig, with_changes
from afa.errors import UserError, choose

METHOD, BASELINE = "afa_", "baseline_"


def names() -> list[str]:
    """Returns the names of all experiments, sorted."""
    files = [module.name for module in pkgutil.iter_modules(__path__)]
    baselines = [BASELINE + x.removeprefix(METHOD) for x in files if x.startswith(METHOD)]
    return sorted([*files, *baselines])


def find(name: str) -> Callable[[bool], ExperimentConfig]:
    """Returns the `config` function of an experiment.

    Raises:
      UserError: unknown experiment; the message suggests the nearest name.
    """
    choose("exp", name, dict.fromkeys(names()))
    config = _module(name).config
    if not name.startswith(BASELINE):
        return config
    return lambda laptop: with_changes(config(laptop), **{"adversarial.enabled": False})


def baseline(method: str) -> str:
    """Returns the name of the baseline of a method.

    Raises:
      UserError: an unknown experiment, or one without a baseline.
    """
    find(method)
    if not method.startswith(METHOD):
        raise UserError(f"exp={method!r} has no baseline (allowed: the experiments {METHOD}...)")
    return BASELINE + method.removeprefix(METHOD)


def proposed(name: str) -> Mapping[str, Sequence[Any]] | None:
    """Returns the fields and values that an experiment proposes to try; None if it has none."""
    sweep = getattr(_module(name), "sweep", None)
    return None if sweep is None else sweep()


def purpose(name: str) -> str:
    """Returns the purpose of an experiment in one line."""
    if name.startswith(BASELINE):
        return f"Baseline of {_method(name)}: the same without the adversarial part."
    return (_module(name).__doc__ or "").partition("\n")[0]


def _method(name: str) -> str:
    return METHOD + name.removeprefix(BASELINE) if name.startswith(BASELINE) else name


def _module(name: str):
    return importlib.import_module(f"{__name__}.{_method(name)}")
