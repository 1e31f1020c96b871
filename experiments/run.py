"""Trains, evaluates, exports and searches: `python -m experiments.run --exp=NAME [--FIELD=VALUE]`.

Exit codes: 0 done; 2 error in the command or the data, reported in one line; 3 training diverged;
75 stopped by SIGTERM or Ctrl-C with everything saved: the same command continues.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from afa import config as configuration
from afa import console
from afa.checks import refuse_unread
from afa.config import LOSS_NAME, ExperimentConfig, LaunchConfig, with_changes
from afa.errors import UserError
from afa.losses import LOSSES
from afa.runs.start import Scale, configured, execute, find, first_prints, is_laptop, join
from experiments import cli, configs

PROGRAM = "python -m experiments.run"


@dataclass(frozen=True)
class Command(ExperimentConfig):
    """An experiment; any of its settings can be changed."""

    exp: str = ""
    """Experiment to run; `list` prints all."""
    workdir: str = ""
    """Directory of the run (empty: runs/EXPERIMENT)."""
    scale: Scale = "auto"
    """laptop: small images and a short schedule; auto: laptop if there is no accelerator."""
    dry_run: bool = False
    """Print the configuration, parameters, operations and memory, and exit."""


def parse(words: Sequence[str]) -> Command:
    """Returns the configuration of the experiment with the given fields changed.

    Raises:
      UserError: an unknown experiment or field, or an invalid value.
    """
    given = cli.given_fields(words)
    exp, scale = given.get("exp", ""), given.get("scale", "auto")
    base = configured(exp, scale, given) if exp not in ("", "list") else ExperimentConfig()
    if LOSS_NAME in given:  # its settings replace those of the experiment's loss
        base = with_changes(base, **{LOSS_NAME: given[LOSS_NAME]})
    default = Command(**{name: getattr(base, name) for name in base.__dataclass_fields__})
    losses = f"Metric losses: {', '.join(LOSSES)}; --loss.name=NAME --help shows their settings."
    about = f"{__doc__}\n{losses}"
    command = cli.fields(words, default, PROGRAM, about, switches=("dry_run",))
    refuse_unread(_settings(command), base)
    return command


def _settings(command: Command) -> ExperimentConfig:
    fields = ExperimentConfig.__dataclass_fields__
    return ExperimentConfig(**{name: getattr(command, name) for name in fields})


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return cli.guarded(lambda: _main(words), after_signal="continues from the last checkpoint")


def _main(words: Sequence[str]) -> int:
    given = cli.given_fields(words)
    named = given.get("exp", "")
    join(find(named)(False).launch if named not in ("", "list") else LaunchConfig(), given)
    command = parse(words)
    if command.exp == "list":
        width = max(map(len, configs.names()))
        for name in configs.names():
            print(f"{name:<{width}}  {configs.purpose(name)}")
        return 0
    if not command.exp:
        raise UserError(f"--exp is missing (allowed: list, {', '.join(configs.names())})")
    config = _settings(command)
    with first_prints():
        if command.dry_run:
            return _dry_run(command.exp, config)
        if is_laptop(command.scale):
            print(f"{command.exp} at laptop scale (no accelerator, or requested); --scale=full "
                  "trains at full scale")  # fmt: skip
        execute(command.exp, config, Path(command.workdir or Path("runs") / command.exp))
    return 0


def _dry_run(exp: str, config: ExperimentConfig) -> int:
    console.quiet()
    from afa.runs import dry_run

    print(json.dumps(configuration.to_dict(config), indent=2))
    for line in dry_run.lines(exp, config):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
