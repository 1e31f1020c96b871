"""Mistakes of the user, told in one line, and the exit codes of every command."""

import difflib
import os
import select
import sys
from collections.abc import Iterable, Mapping
from typing import TextIO, TypeVar

EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE, as of every program in `| head -1`

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user. Its text is one line: field, value, what is allowed, nearest match.

    >>> import afa
    >>> try:
    ...     afa.run("debugg")
    ... except afa.UserError as error:
    ...     print(str(error).partition(" (allowed")[0])
    exp='debugg' is unknown; did you mean 'debug'?
    """


class TrainingDiverged(Exception):
    """A loss, a gradient or a parameter stopped being finite.

    Attributes:
      step: the step that produced it (counted from 1).
      part: the first part that was not finite, in the order the step computes them.
      kept: step of the last good checkpoint; None when there is none.

    >>> import afa
    >>> print(afa.TrainingDiverged(7, "metric_loss", kept=4))
    step 7: metric_loss is not finite; training stopped, step 4 is the last good one
    """

    def __init__(self, step: int, part: str, kept: int | None) -> None:
        self.step, self.part, self.kept = step, part, kept
        last = "no checkpoint was written" if kept is None else f"step {kept} is the last good one"
        super().__init__(f"step {step}: {part} is not finite; training stopped, {last}")


def printable(text: str) -> str:
    """Text on one line: line breaks, control characters and bytes that are no text as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(value: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the name closest to `value`, or nothing when none is close."""
    match = difflib.get_close_matches(value, list(names), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def choose(field: str, value: str, table: Mapping[str, T]) -> T:
    """Looks `value` up in `table`.

    Raises:
      UserError: naming the field, the value, the nearest name and all names allowed.
    """
    if value in table:
        return table[value]
    allowed = ", ".join(sorted(table))
    raise UserError(f"{field}={value!r} is unknown{nearest(value, table)} (allowed: {allowed})")


def drop_unread() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more, as after `| head -1`.

    What is still written there is dropped, also by the interpreter at its end.
    """
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in unread:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    try:
        stream.flush()
        asked = select.poll()
        asked.register(stream.fileno(), 0)  # an error is told whether it is asked for or not
        return any(event & select.POLLERR for _, event in asked.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):  # no file of the system; no poll in it
        return False
