"""Trains, evaluates, exports and searches: `python -m experiments.run --exp=NAME [--FIELD=VALUE]`.

Exit codes: 0 done; 2 a mistake in the command or the data, told in one line; 3 training diverged;
75 stopped by SIGTERM or Ctrl-C with everything saved: the same command goes on.
"""

import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from afa import config as configuration
from afa.checks import KINDS, refuse_unread
from afa.config import LOSS_NAME, ExperimentConfig, refuse_unknown, with_changes
from afa.errors import (
    EXIT_DIVERGED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    TrainingDiverged,
    UserError,
    nearest,
    printable,
)
from afa.losses import LOSSES
from experiments import configs

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
    recipe = configured(exp, scale, changes)
    config = with_changes(recipe, **changes)
    refuse_unread(config, recipe)
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
    given = _given(words)
    exp, scale = given.get("exp", ""), given.get("scale", "auto")
    if scale not in ("auto", "laptop", "full"):
        raise UserError(f"scale={scale!r} is unknown (allowed: auto, laptop, full)")
    base = configured(exp, scale, given) if exp not in ("", "list") else ExperimentConfig()
    if LOSS_NAME in given:  # its settings take the place of those of the recipe's loss
        base = with_changes(base, **{LOSS_NAME: given[LOSS_NAME]})
    default = Command(**{name: getattr(base, name) for name in base.__dataclass_fields__})
    for name in given:
        if name != "help":
            refuse_unknown(name.removeprefix("no_"), default, "--", " (--help lists all)")
    command = _parsed(words, given, default)
    refuse_unread(_settings(command), base)
    return command


def _settings(command: Command) -> ExperimentConfig:
    fields = ExperimentConfig.__dataclass_fields__
    return ExperimentConfig(**{name: getattr(command, name) for name in fields})


def _parsed(words: Sequence[str], given: Mapping[str, str], default: Command) -> Command:
    """The words read by tyro, which also answers --help."""
    said = io.StringIO()
    losses = f"Metric losses: {', '.join(LOSSES)}; --loss.name=NAME --help shows the settings."
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Command,
                prog=PROGRAM,
                description=f"{__doc__}\n{losses}",
                default=default,
                args=[_spelled(word) for word in words],
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise _mistake(said.getvalue(), given, configuration.flatten(default)) from None


def _mistake(said: str, given: Mapping[str, str], default: Mapping[str, Any]) -> UserError:
    """One line instead of the box that tyro draws around an error and its help."""
    text = re.sub(r"[─│╭╮╰╯\s]+", " ", said).strip()
    text = text.partition(" Argument helptext")[0].partition(" For full helptext")[0]
    found = re.search(r"--([\w.]+)", text)
    name = found[1] if found else ""
    if stray := re.search(r"Unrecognized options: (\S+)", text):
        return UserError(f"{stray[1]!r} is no field (fields are written --FIELD=VALUE)")
    if name not in given or name not in default:
        return UserError(re.sub(r"^(Value|Parsing) error ", "", text))
    value, _, expected = given[name], *text.partition("Expected one of ")[1:]
    if allowed := re.findall(r"'([^']*)'", expected):
        return UserError(
            f"{name}={value!r} is unknown{nearest(value, allowed)} (allowed: {', '.join(allowed)})"
        )
    return UserError(f"{name}={value!r} {KINDS[type(default[name])]}")


def _given(words: Sequence[str]) -> dict[str, str]:
    """The fields on the command line and their values as text.

    Raises:
      UserError: a word that is neither a field nor the value of one.
    """
    given: dict[str, str] = {}
    last = ""
    for word in words:
        if word == "-h" or word.startswith("--"):
            last, equals, value = word.removeprefix("--").replace("-", "_").partition("=")
            last = "help" if word == "-h" else last
            value = word.partition("=")[2]
            given[last] = value if equals else ""
        elif last:
            given[last] = f"{given[last]} {word}".strip()
        else:
            raise UserError(f"{word!r} is no field (fields are written --FIELD=VALUE)")
    return given


def _spelled(word: str) -> str:
    """A bare switch gets its value: `--dry_run` means `--dry_run=True`."""
    return f"{word}=True" if word in ("--dry_run", "--dry-run") else word


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return guarded(lambda: _main(words), after_signal="goes on from the last checkpoint")


def guarded(command: Callable[[], int], after_signal: str = "begins anew") -> int:
    """Runs a command; mistakes and early ends become one line and an exit code.

    Args:
      command: returns its own exit code.
      after_signal: what the same command does when it was stopped by a signal and is given again.
    """
    try:
        with _stopping():
            return command()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except TrainingDiverged as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    except Exception as error:
        if type(error).__name__ != "Preempted":
            raise
        print(f"{error}; the same command goes on (exit code {EXIT_PREEMPTED})", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        told = f"the same command {after_signal} (exit code {EXIT_PREEMPTED})"
        print(f"stopped by a signal; {told}", file=sys.stderr)
        return EXIT_PREEMPTED


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does; while training, either is noted and obeyed between steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(words: Sequence[str]) -> int:
    _join(_given(words))
    command = parse(words)
    if command.exp == "list":
        width = max(map(len, configs.names()))
        for name in configs.names():
            print(f"{name:<{width}}  {configs.purpose(name)}")
        return 0
    if not command.exp:
        raise UserError(f"--exp is missing (allowed: list, {', '.join(configs.names())})")
    config = _settings(command)
    if command.dry_run:
        return _dry_run(command.exp, config)
    if is_laptop(command.scale):
        print(f"{command.exp} at laptop scale (no accelerator, or asked for); --scale=full trains "
              "for real")  # fmt: skip
    _execute(command.exp, config, command.workdir)
    return 0


def _execute(exp: str, config: ExperimentConfig, workdir: str) -> dict[str, Any]:
    quiet()
    from afa import parallel, runtime
    from afa.runs import run as job

    home = Path(workdir or Path("runs") / exp)
    chief = parallel.process_index() == 0  # of several processes one speaks
    speaking = contextlib.nullcontext() if chief else contextlib.redirect_stdout(io.StringIO())
    try:
        with speaking:
            return job.run(exp, config, home)
    finally:
        runtime.forget_programs()  # of a notebook that calls this again and again


def _dry_run(exp: str, config: ExperimentConfig) -> int:
    quiet()
    from afa.runs import dry_run

    print(json.dumps(configuration.to_dict(config), indent=2))
    for line in dry_run.lines(exp, config):
        print(line)
    return 0


def quiet() -> None:
    """Keeps libraries' own log lines off the terminal; their errors still come through."""
    import logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
