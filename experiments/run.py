"""Trains, evaluates, exports and searches: `python -m experiments.run --exp=NAME [--FIELD=VALUE]`.

Exit codes: 0 done; 2 a mistake in the command or the data, told in one line; 3 training diverged;
75 stopped by SIGTERM or Ctrl-C with everything saved: the same command goes on.
"""

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import experiments
from afa import config as configuration
from afa.config import ExperimentConfig
from afa.errors import UserError
from experiments import cli

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
    _join(changes)
    config = configuration.with_changes(configured(exp, scale), **changes)
    return _execute(exp, config, workdir)


def _join(given: Mapping[str, Any]) -> None:
    """Joins the other processes of the run, if any: before JAX first looks for devices.

    Raises:
      UserError: launch.coordinator without its companions.
    """
    from afa import parallel

    coordinator = given.get("launch.coordinator", "")
    numbers = [given.get(f"launch.{name}", "") for name in ("processes", "index")]
    if coordinator and not all(str(number).isdecimal() for number in numbers):
        raise UserError("launch.coordinator needs launch.processes and launch.index, two numbers")
    if coordinator:
        parallel.start(coordinator, *(int(number) for number in numbers))


def configured(exp: str, scale: Scale) -> ExperimentConfig:
    """The configuration of an experiment at a scale.

    Raises:
      UserError: no such experiment.
    """
    found = experiments.find(exp)
    return found(is_laptop(scale))


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
    base = configured(exp, scale) if exp not in ("", "list") else ExperimentConfig()
    default = Command(**{name: getattr(base, name) for name in base.__dataclass_fields__})
    return cli.fields(words, default, PROGRAM, __doc__, switches=("dry_run",))


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return cli.guarded(lambda: _main(words), after_signal="goes on from the last checkpoint")


def _main(words: Sequence[str]) -> int:
    _join(cli.given_fields(words))
    command = parse(words)
    if command.exp == "list":
        width = max(map(len, experiments.names()))
        for name in experiments.names():
            print(f"{name:<{width}}  {experiments.purpose(name)}")
        return 0
    if not command.exp:
        raise UserError(f"--exp is missing (allowed: list, {', '.join(experiments.names())})")
    fields = ExperimentConfig.__dataclass_fields__
    config = ExperimentConfig(**{name: getattr(command, name) for name in fields})
    if command.dry_run:
        return _dry_run(command.exp, config)
    if is_laptop(command.scale):
        print(f"{command.exp} at laptop scale (no accelerator, or asked for); --scale=full trains "
              "for real")  # fmt: skip
    _execute(command.exp, config, command.workdir)
    return 0


def _execute(exp: str, config: ExperimentConfig, workdir: str) -> dict[str, Any]:
    cli.quiet()
    from afa import parallel
    from afa.runs import run as job

    home = Path(workdir or Path("runs") / exp)
    chief = parallel.process_index() == 0  # of several processes one speaks
    speaking = contextlib.nullcontext() if chief else contextlib.redirect_stdout(io.StringIO())
    try:
        with speaking:
            return job.run(exp, config, home)
    finally:
        parallel.forget_programs()  # of a notebook that calls this again and again


def _dry_run(exp: str, config: ExperimentConfig) -> int:
    cli.quiet()
    from afa.runs import dry_run

    print(json.dumps(configuration.to_dict(config), indent=2))
    for line in dry_run.lines(exp, config):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
