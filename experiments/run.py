"""Trains, evaluates, exports and searches: `python -m experiments.run --exp=NAME [--FIELD=VALUE]`.

Exit codes: 0 done; 2 a mistake in the command or the data, told in one line; 3 training diverged;
75 stopped by SIGTERM or Ctrl-C with everything saved: the same command goes on.
"""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from afa import config as configuration
from afa.checks import refuse_unread
from afa.config import LOSS_NAME, ExperimentConfig, LaunchConfig, with_changes
from afa.errors import UserError
from afa.losses import LOSSES
from experiments import cli, configs

PROGRAM = "python -m experiments.run"
Scale = Literal["auto", "laptop", "full"]


@dataclass(frozen=True)
class Command(ExperimentConfig):
    """One experiment, with any of its settings changed."""

    exp: str = ""
    """Experiment to run; `list` names them all."""
    workdir: str = ""
    """Directory of the run (empty: runs/EXPERIMENT)."""
    scale: Scale = "auto"
    """laptop: small images and a short schedule; auto: laptop where there is no accelerator."""
    dry_run: bool = False
    """Print the configuration, parameters, operations and memory, and stop."""


def run(exp: str, *, workdir: str = "", scale: Scale = "auto", **changes: Any) -> dict[str, Any]:
    """An experiment from a notebook: `run("afa_resnet18", **{"data.image_size": 64})`.

    Returns:
      What `result.json` holds.

    Raises:
      UserError, TrainingDiverged, Preempted: see `afa.runs.run`.
    """
    _join(exp, changes)
    recipe = configured(exp, scale, changes)
    config = with_changes(recipe, **changes)
    refuse_unread(config, recipe)
    with _first_prints():
        return _execute(exp, config, workdir)


def _join(exp: str, given: Mapping[str, Any]) -> None:
    """Joins the other processes of the run, if any, before JAX first looks for devices.

    Raises:
      UserError: no such experiment, no numbers where numbers are needed, or no coordinator there.
    """
    from afa import parallel

    # At full scale, since asking for the scale looks for devices; `launch` is the same at either.
    launch = configs.find(exp)(False).launch if exp not in ("", "list") else LaunchConfig()
    values = dataclasses.asdict(launch)
    values |= {name: given.get(f"launch.{name}", value) for name, value in values.items()}
    if not all(str(values[name]).isdecimal() for name in ("processes", "index")):
        raise UserError("launch.processes and launch.index must be two whole numbers")
    parallel.start(values["coordinator"], int(values["processes"]), int(values["index"]))


def configured(exp: str, scale: Scale, given: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration of an experiment at a scale, before the given fields are changed.

    Where they ask for random weights, the recipe's settings of fine-tuning are taken back.

    Raises:
      UserError: no such experiment.
    """
    found = configs.find(exp)(is_laptop(scale))
    scratch = given.get("backbone.weights") == configuration.RANDOM
    return configuration.from_scratch(found) if scratch else found


def is_laptop(scale: Scale) -> bool:
    """Whether the small form of an experiment is meant."""
    from afa import parallel

    return scale == "laptop" or (scale == "auto" and not parallel.accelerated())


def parse(words: Sequence[str]) -> Command:
    """The command line as a configuration: the experiment's, with the given fields changed.

    Raises:
      UserError: unknown experiment or field, or a value that does not fit its field.
    """
    given = cli.given_fields(words)
    exp, scale = given.get("exp", ""), given.get("scale", "auto")
    if scale not in ("auto", "laptop", "full"):
        raise UserError(f"scale={scale!r} is unknown (allowed: auto, laptop, full)")
    base = configured(exp, scale, given) if exp not in ("", "list") else ExperimentConfig()
    if LOSS_NAME in given:  # its settings take the place of those of the recipe's loss
        base = with_changes(base, **{LOSS_NAME: given[LOSS_NAME]})
    default = Command(**{name: getattr(base, name) for name in base.__dataclass_fields__})
    losses = f"Metric losses: {', '.join(LOSSES)}; --loss.name=NAME --help shows the settings."
    about = f"{__doc__}\n{losses}"
    command = cli.fields(words, default, PROGRAM, about, switches=("dry_run",))
    refuse_unread(_settings(command), base)
    return command


def _settings(command: Command) -> ExperimentConfig:
    fields = ExperimentConfig.__dataclass_fields__
    return ExperimentConfig(**{name: getattr(command, name) for name in fields})


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return cli.guarded(lambda: _main(words), after_signal="goes on from the last checkpoint")


def _main(words: Sequence[str]) -> int:
    given = cli.given_fields(words)
    _join(given.get("exp", ""), given)
    command = parse(words)
    if command.exp == "list":
        width = max(map(len, configs.names()))
        for name in configs.names():
            print(f"{name:<{width}}  {configs.purpose(name)}")
        return 0
    if not command.exp:
        raise UserError(f"--exp is missing (allowed: list, {', '.join(configs.names())})")
    config = _settings(command)
    with _first_prints():
        if command.dry_run:
            return _dry_run(command.exp, config)
        if is_laptop(command.scale):
            print(f"{command.exp} at laptop scale (no accelerator, or asked for); --scale=full "
                  "trains for real")  # fmt: skip
        _execute(command.exp, config, command.workdir)
    return 0


def _first_prints() -> contextlib.AbstractContextManager[object]:
    """Inside, only the first of several processes prints."""
    from afa import parallel

    if parallel.process_index() == 0:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(io.StringIO())


def _execute(exp: str, config: ExperimentConfig, workdir: str) -> dict[str, Any]:
    cli.quiet()
    from afa import runtime
    from afa.runs import run as job

    try:
        return job.run(exp, config, Path(workdir or Path("runs") / exp))
    finally:
        runtime.forget_programs()  # of a notebook that calls this again and again


def _dry_run(exp: str, config: ExperimentConfig) -> int:
    cli.quiet()
    from afa.runs import dry_run

    print(json.dumps(configuration.to_dict(config), indent=2))
    for line in dry_run.lines(exp, config):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
