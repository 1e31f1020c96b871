"""Starts a run: `afa.run`, and what it shares with the command `python -m experiments.run`.

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
    """Trains, evaluates, exports, indexes and reports; a run that was stopped goes on.

        afa.run("afa_resnet18", workdir="runs/small", **{"data.image_size": 64})

    Args:
      exp: name of a recipe (a file of `experiments/configs`), or a configuration.
      workdir: directory of the run; runs/EXP when empty. A configuration needs one, and the run is
        then called as the directory is.
      scale: of a recipe: "laptop" is small images and a short schedule, "auto" is that where there
        is no accelerator.
      changes: fields to change, by their names with dots.

    Returns:
      What `result.json` holds: config, commit, data, metrics, timings, ...

    Raises:
      UserError: no such recipe or field, or any mistake in settings or data.
      TrainingDiverged: a loss, a gradient or a parameter stopped being finite.
      Preempted: SIGTERM or Ctrl-C; the state is saved, and the same call goes on.
    """
    if isinstance(exp, ExperimentConfig):
        if scale != "auto":
            raise UserError(f"scale={scale!r} is of recipes; a configuration has its own sizes")
        if not str(workdir):
            raise UserError("workdir is missing: a configuration has no name to call a run by")
        name, home = Path(workdir).absolute().name, Path(workdir)
        join(exp.launch, changes)
        recipe = exp
    else:
        name, home = exp, Path(workdir or Path("runs") / exp)
        join(find(exp)(False).launch, changes)
        recipe = configured(exp, scale, changes)
    config = with_changes(recipe, **changes)
    refuse_unread(config, recipe)
    return execute(name, config, home)


def find(name: str) -> Callable[[bool], ExperimentConfig]:
    """The `config` function of a recipe.

    Raises:
      UserError: no such recipe; the nearest is named.
    """
    # The one import of this package that runs upwards. A recipe is data, as a file of settings
    # would be: nothing in `afa` depends on any, only a name that a user gives leads to it.
    from experiments import configs

    return configs.find(name)


def configured(exp: str, scale: str, given: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration of a recipe at a scale, before the given fields are changed.

    Where they ask for random weights, the recipe's settings of fine-tuning are taken back.

    Raises:
      UserError: no such recipe or scale.
    """
    choose("scale", scale, dict.fromkeys(get_args(Scale)))
    found = find(exp)(is_laptop(scale))
    scratch = given.get("backbone.weights") == configuration.RANDOM
    return configuration.from_scratch(found) if scratch else found


def is_laptop(scale: str) -> bool:
    """Whether the small form of a recipe is meant."""
    from afa import parallel

    return scale == "laptop" or (scale == "auto" and not parallel.accelerated())


def join(launch: LaunchConfig, given: Mapping[str, Any]) -> None:
    """Joins the other processes of the run, if any, before JAX first looks for devices.

    Args:
      launch: of the recipe at full scale, since to ask for the scale looks for devices; it is the
        same at either.
      given: fields that are changed.

    Raises:
      UserError: no numbers where numbers are needed, or no coordinator there.
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
    """The run itself (`afa.runs.run`); of several processes one prints."""
    from afa import console

    console.quiet()
    from afa import runtime
    from afa.runs import run as job

    try:
        with first_prints():
            return job.run(exp, config, workdir)
    finally:
        runtime.forget_programs()  # of a notebook that calls this again and again


def first_prints() -> contextlib.AbstractContextManager[object]:
    """Inside, only the first of several processes prints."""
    from afa import parallel

    if parallel.process_index() == 0:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())
