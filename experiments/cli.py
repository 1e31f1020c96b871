"""What every command shares: its options, mistakes told in one line, and its exit code.

Nothing here imports JAX, so that `--help` and a misspelt option answer at once.
"""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from afa.bounds import KINDS
from afa.errors import (
    EXIT_CLOSED_PIPE,
    EXIT_DIVERGED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    TrainingDiverged,
    UserError,
    drop_unread,
    nearest,
    printable,
)
from afa.io import PROGRAM_CACHE, require_writable

T = TypeVar("T")


# ---- options -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Options of a command whose mistakes are `UserError`; an unknown name gets the nearest one."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        # A shortened name would hide that it is no option, or change its meaning with a new one.
        super().__init__(*given, **{"allow_abbrev": False} | settings)
        self.add_argument(
            "--program_cache", metavar="DIR", default=argparse.SUPPRESS,
            help="directory of compiled programs; off: compile them anew (default: auto)",
        )  # fmt: skip

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """As `argparse` does.

        Raises:
          UserError: an option that there is not, one that is missing, or a value that does not fit.
        """
        args = sys.argv[1:] if args is None else list(args)
        known = self._names()
        for word in args[: args.index("--")] if "--" in args else args:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:  # before argparse misses another one
                self.error(f"{name} is no option{nearest(name, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{_reworded(message)} ({self.prog} --help lists the options)")

    def add_out(self) -> None:
        """The option --out, a file that can be written: looked at before any work is done."""
        self.add_argument(
            "--out", type=new_file, default=None, metavar="FILE", help="write the figures as JSON"
        )

    def _names(self) -> set[str]:
        """Every option, of sub-commands too."""
        names = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names = names.union(*(each._names() for each in action.choices.values()))
        return names


def _reworded(message: str) -> str:
    """An error of argparse as every other error here is worded."""
    if found := re.match(r"argument ([^:]+): invalid (int|float) value: (.*)", message, re.DOTALL):
        return f"{found[1]}={found[3]} {KINDS[{'int': int, 'float': float}[found[2]]]}"
    choice = r"argument ([^:]+): invalid choice: '?(.*?)'? \(choose from (.*)\)"
    if found := re.match(choice, message, re.DOTALL):
        names = [each.strip(" '") for each in found[3].split(",")]
        allowed = ", ".join(names)
        return f"{found[1]}={found[2]!r} is unknown{nearest(found[2], names)} (allowed: {allowed})"
    return message.removeprefix("argument ")


def new_file(word: str) -> Path:
    """A file that can be written, as the type of an option.

    Raises:
      argparse.ArgumentTypeError: it is a directory, its own does not exist or may not be written.
    """
    path = Path(word)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: it is a directory")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no directory {path.parent}")
    try:
        require_writable(path.parent, "directory")  # the file is replaced, not written over
    except UserError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None
    return path


# ---- fields of a configuration -----------------------------------------------------------------


def fields(
    words: Sequence[str], default: T, program: str, description: str | None, switches: Sequence[str]
) -> T:
    """The command line as a dataclass: `default` with the given fields changed.

    Args:
      words: `--FIELD=VALUE`, or `--FIELD VALUE ...`; dots lead into nested dataclasses.
      default: the dataclass.
      program: what the command is called.
      description: what `--help` says first.
      switches: fields that a bare `--FIELD` makes True.

    Raises:
      UserError: an unknown field, or a value that does not fit its field.
    """
    import tyro

    from afa import config as configuration

    given, flat = given_fields(words), configuration.flatten(default)
    for name in given:
        if name != "help":
            plain = name.removeprefix("no_")
            configuration.refuse_unknown(plain, default, "--", " (--help lists all)")
    bare = {f"--{name}" for name in switches}
    bare |= {name.replace("_", "-") for name in bare}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                type(default),
                prog=program,
                description=description,
                default=default,
                args=[f"{word}=True" if word in bare else word for word in words],
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise _mistake(said.getvalue(), given, flat) from None


def given_fields(words: Sequence[str]) -> dict[str, str]:
    """The fields on a command line and their values as text.

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


# ---- one command -------------------------------------------------------------------------------


def perform(
    parser: Callable[[], Parser],
    act: Callable[[argparse.Namespace], int],
    words: Sequence[str] | None = None,
) -> int:
    """A whole command: reads its options and acts on them.

    Args:
      parser: makes its options.
      act: what it does with the chosen ones; returns the exit code.
      words: the command line; None is that of the process.

    Returns:
      The exit code.
    """

    def command() -> int:
        chosen = parser().parse_args(words)
        if "program_cache" in chosen:
            os.environ[PROGRAM_CACHE] = chosen.program_cache
        from afa import console

        console.quiet()
        return act(chosen)

    return guarded(command)


def guarded(command: Callable[[], int], after_signal: str = "begins anew") -> int:
    """Runs a command; mistakes and early ends become one line and an exit code.

    Args:
      command: returns its own exit code.
      after_signal: what the same command does when it was stopped by a signal and is given again.
    """
    try:
        try:
            return _told(command, after_signal)
        finally:
            # A pipe that nobody reads any more is noticed here, not when the interpreter ends.
            if sys.stdout is not None:  # closed by `>&-`
                sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        # rich makes a SystemExit of it.
        piped = isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)
        if not piped or not (drop_unread() or isinstance(error, SystemExit)):
            raise
        return EXIT_CLOSED_PIPE


def _told(command: Callable[[], int], after_signal: str) -> int:
    try:
        with _stopping():
            return command()
    except UserError as error:
        return _end(f"error: {error}", EXIT_USER_ERROR)
    except TrainingDiverged as error:
        return _end(f"error: {error}", EXIT_DIVERGED)
    except Exception as error:
        if type(error).__name__ == "Preempted":
            told = f"the same command goes on (exit code {EXIT_PREEMPTED})"
            return _end(f"{error}; {told}", EXIT_PREEMPTED)
        if reason := _without_devices():
            return _end(f"error: {reason}", EXIT_USER_ERROR)
        raise
    except KeyboardInterrupt:
        told = f"the same command {after_signal} (exit code {EXIT_PREEMPTED})"
        return _end(f"stopped by a signal; {told}", EXIT_PREEMPTED)


def _end(line: str, code: int) -> int:
    note(printable(line))  # the name of a file may hold anything
    return code


def _without_devices() -> str:
    """Whatever failed: why JAX has no devices, if it has none."""
    if "jax" not in sys.modules:
        return ""
    from afa import parallel

    try:
        parallel.require_devices()
    except UserError as error:
        return str(error)
    return ""


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


def note(text: str) -> None:
    """Tells of progress, beside the results on standard output."""
    print(text, file=sys.stderr)
