"""Shared by all commands: option parsing, errors of one line, and exit codes.

Does not import JAX, so that `--help` and errors in options are fast.
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
    """Argument parser that raises `UserError`, with the nearest name for an unknown option."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        # An abbreviation would hide an unknown option, or change meaning when options are added.
        super().__init__(*given, **{"allow_abbrev": False} | settings)
        self.add_argument(
            "--program_cache", metavar="DIR", default=argparse.SUPPRESS,
            help="directory of compiled programs; off: no cache (default: auto)",
        )  # fmt: skip

    @classmethod
    def of(cls, program: str, docstring: str | None) -> "Parser":
        """Returns a parser whose help shows a module's docstring with its line breaks."""
        return cls(
            prog=program,
            description=docstring,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parses the command line.

        Raises:
          UserError: an unknown or missing option, or an invalid value.
        """
        args = sys.argv[1:] if args is None else list(args)
        known = self._names()
        for word in args[: args.index("--")] if "--" in args else args:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:  # before argparse reports a missing one
                self.error(f"{name} is not an option{nearest(name, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{_reworded(message)} ({self.prog} --help lists the options)")

    def add_out(self) -> None:
        """Adds the option --out, a file; whether it can be written is checked while parsing."""
        self.add_argument(
            "--out", type=new_file, default=None, metavar="FILE", help="write the results as JSON"
        )

    def _names(self) -> set[str]:
        """Returns all options, including those of sub-commands."""
        names = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names = names.union(*(each._names() for each in action.choices.values()))
        return names


def _reworded(message: str) -> str:
    """Rewrites an error of argparse in the form of the other errors."""
    if found := re.match(r"argument ([^:]+): invalid (int|float) value: (.*)", message, re.DOTALL):
        return f"{found[1]}={found[3]} {KINDS[{'int': int, 'float': float}[found[2]]]}"
    choice = r"argument ([^:]+): invalid choice: '?(.*?)'? \(choose from (.*)\)"
    if found := re.match(choice, message, re.DOTALL):
        names = [each.strip(" '") for each in found[3].split(",")]
        allowed = ", ".join(names)
        return f"{found[1]}={found[2]!r} is unknown{nearest(found[2], names)} (allowed: {allowed})"
    return message.removeprefix("argument ")


def new_file(word: str) -> Path:
    """Option type: path of a file that can be written.

    Raises:
      argparse.ArgumentTypeError: it is a directory, or its parent does not exist or is read-only.
    """
    path = Path(word)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a directory")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: directory {path.parent} does not exist")
    try:
        require_writable(path.parent, "directory")  # the file is replaced, not overwritten
    except UserError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None
    return path


# ---- fields of a configuration -----------------------------------------------------------------


def fields(
    words: Sequence[str], default: T, program: str, description: str | None, switches: Sequence[str]
) -> T:
    """Parses a command line into a dataclass: `default` with the given fields changed.

    Args:
      words: `--FIELD=VALUE`, or `--FIELD VALUE ...`; nested fields are written with dots.
      default: the dataclass.
      program: name of the command.
      description: first text of `--help`.
      switches: fields that `--FIELD` without a value sets to True.

    Raises:
      UserError: an unknown field, or an invalid value.
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
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
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
        raise _user_error(output.getvalue(), given, flat) from None


def given_fields(words: Sequence[str]) -> dict[str, str]:
    """Returns the fields on a command line and their values as text.

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
            raise UserError(f"{word!r} is not a field (fields are written --FIELD=VALUE)")
    return given


def _user_error(output: str, given: Mapping[str, str], default: Mapping[str, Any]) -> UserError:
    """Converts the error box of tyro to one line."""
    text = re.sub(r"[─│╭╮╰╯\s]+", " ", output).strip()
    text = text.partition(" Argument helptext")[0].partition(" For full helptext")[0]
    found = re.search(r"--([\w.]+)", text)
    name = found[1] if found else ""
    if stray := re.search(r"Unrecognized options: (\S+)", text):
        return UserError(f"{stray[1]!r} is not a field (fields are written --FIELD=VALUE)")
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
    """Runs a command: parses its options and calls `act`.

    Args:
      parser: makes the parser.
      act: called with the parsed options; returns the exit code.
      words: the command line; None for that of the process.

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


def guarded(command: Callable[[], int], after_signal: str = "starts again") -> int:
    """Runs a command; user errors and signals are reported in one line with an exit code.

    Args:
      command: returns its exit code.
      after_signal: what the same command does after it was stopped by a signal, for the message.
    """
    try:
        try:
            return _exit_code(command, after_signal)
        finally:
            # Detects a closed pipe here, not at the end of the interpreter.
            if sys.stdout is not None:  # closed by `>&-`
                sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        # rich converts it to SystemExit.
        piped = isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)
        if not piped or not (drop_unread() or isinstance(error, SystemExit)):
            raise
        return EXIT_CLOSED_PIPE


def _exit_code(command: Callable[[], int], after_signal: str) -> int:
    """Runs a command and returns its exit code; prints expected errors."""
    try:
        with _stopping():
            return command()
    except UserError as error:
        return _end(f"error: {error}", EXIT_USER_ERROR)
    except TrainingDiverged as error:
        return _end(f"error: {error}", EXIT_DIVERGED)
    except Exception as error:
        if type(error).__name__ == "Preempted":
            advice = f"the same command continues (exit code {EXIT_PREEMPTED})"
            return _end(f"{error}; {advice}", EXIT_PREEMPTED)
        if reason := _without_devices():
            return _end(f"error: {reason}", EXIT_USER_ERROR)
        raise
    except KeyboardInterrupt:
        advice = f"the same command {after_signal} (exit code {EXIT_PREEMPTED})"
        return _end(f"stopped by a signal; {advice}", EXIT_PREEMPTED)


def _end(line: str, code: int) -> int:
    note(printable(line))  # the name of a file may hold anything
    return code


def _without_devices() -> str:
    """Returns why JAX has no devices; "" if it has some or is not imported."""
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
    """Makes SIGTERM stop as Ctrl-C does; training handles both between steps."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def note(text: str) -> None:
    """Prints progress to standard error; results go to standard output."""
    print(text, file=sys.stderr)
