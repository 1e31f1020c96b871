"""Starts a run: `afa.run`, and the parts that the command `python -m experiments.run` uses too.

JAX is imported inside the functions that need it, so that the command's `--help` answers at once.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from afa import config as configuration
from afa.checks import refuse_unread
from afa.config import ExperimentConfig, LaunchConfig, with_changes
from afa.errors import UserError, choose
from afa.io import PROGRAM_CACHE

Scale = Literal["auto", "laptop", "full"]


def run(
    exp: str | ExperimentConfig, *, workdir: str | Path = "", scale: str = "auto", **changes: Any
) -> dict[str, Any]:
    """Trains, evaluates, exports, indexes and reports; an interrupted run is resumed.

        afa.run("afa_resnet18", workdir="runs/small", **{"data.image_size": 64})

    Args:
      exp: name of a recipe (a file of `experiments/configs`), or a configuration.
      workdir: directory of the run; runs/EXP if empty. It is required for a configuration, and its
        name is then the name of the run.
      scale: scale of a recipe: "full", "laptop" (small images, a short schedule), or "auto":
        "laptop" without an accelerator, else "full".
      changes: fields to change, by their dotted names.

    Returns:
      The content of `result.json`: config, commit, data, metrics, timings, ...

    Raises:
      UserError: no such recipe or field, or a mistake in settings or data.
      TrainingDiverged: a loss, a gradient or a parameter is no longer finite.
      Preempted: SIGTERM or Ctrl-C; the state is saved, and the same call resumes the run.
    """
    if isinstance(exp, ExperimentConfig):
        if scale != "auto":
            raise UserError(f"scale={scale!r} is of recipes; a configuration has its own sizes")
        if not str(workdir):
            raise UserError("workdir is missing: a configuration has no name to call a run by")
        name, directory = Path(workdir).absolute().name, Path(workdir)
        join(exp.launch, changes)
        recipe = exp
    else:
        name, directory = exp, Path(workdir or Path("runs") / exp)
        join(find(exp)(False).launch, changes)
        recipe = configured(exp, scale, changes)
    config = with_changes(recipe, **changes)
    refuse_unread(config, recipe)
    return execute(name, config, directory)


def find(name: str) -> Callable[[bool], ExperimentConfig]:
    """Returns the `config` function of a recipe.

    Raises:
      UserError: no such recipe; the nearest name is given.
    """
    # The only import of this package from a higher layer. Recipes are data, like settings files:
    # no code in `afa` depends on a particular one.
    from experiments import configs

    return configs.find(name)


def configured(exp: str, scale: str, given: Mapping[str, Any]) -> ExperimentConfig:
    """Returns the configuration of a recipe at a scale, before the given fields are changed.

    If they set random weights, the fine-tuning settings of the recipe are reset.

    Raises:
      UserError: no such recipe or scale.
    """
    choose("scale", scale, dict.fromkeys(get_args(Scale)))
    found = find(exp)(is_laptop(scale))
    scratch = given.get("backbone.weights") == configuration.RANDOM
    return configuration.from_scratch(found) if scratch else found


def is_laptop(scale: str) -> bool:
    """Whether a recipe runs at the scale "laptop"."""
    from afa import parallel

    return scale == "laptop" or (scale == "auto" and not parallel.accelerated())


def join(launch: LaunchConfig, given: Mapping[str, Any]) -> None:
    """Joins the other processes of the run, if any, before JAX initialises its devices.

    Args:
      launch: of the recipe at full scale; it is the same at every scale, and choosing the scale
        would initialise the devices.
      given: fields that are changed.

    Raises:
      UserError: values that are not numbers, or no coordinator at the address.
    """
    from afa import parallel

    values = dataclasses.asdict(launch)
    values |= {name: given.get(f"launch.{name}", value) for name, value in values.items()}
    if not all(str(values[name]).isdecimal() for name in ("processes", "index")):
        raise UserError("launch.processes and launch.index must be two whole numbers")
    if ":" in values["coordinator"] and int(values["processes"]) < 2:
        raise UserError("launch.coordinator needs launch.processes and launch.index, two numbers")
    if values["program_cache"] != "auto":
        os.environ[PROGRAM_CACHE] = values["program_cache"]
    parallel.start(values["coordinator"], int(values["processes"]), int(values["index"]))


def execute(exp: str, config: ExperimentConfig, workdir: Path) -> dict[str, Any]:
    """Executes the run (`afa.runs.run`); only the first of several processes prints."""
    from afa import console

    console.quiet()
    from afa import runtime
    from afa.runs import run as job

    try:
        with first_prints():
            return job.run(exp, config, workdir)
    finally:
        runtime.forget_programs()  # frees memory in notebooks that start many runs


def first_prints() -> contextlib.AbstractContextManager[object]:
    """Returns a context in which only the first of several processes prints."""
    from afa import parallel

    if parallel.process_index() == 0:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())
