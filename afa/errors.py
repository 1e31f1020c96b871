"""User errors, reported in one line, and the exit codes of all commands."""

import difflib
import os
import select
import sys
from collections.abc import Iterable, Mapping
from typing import TextIO, TypeVar

EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, continues
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE, as for any program in `| head -1`

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user. The message is one line: field, value, allowed values, nearest match.

    >>> import afa
    >>> try:
    ...     afa.run("debugg")
    ... except afa.UserError as error:
    ...     print(str(error).partition(" (allowed")[0])
    exp='debugg' is unknown; did you mean 'debug'?
    """


class TrainingDiverged(Exception):
    """A loss, a gradient or a parameter is not finite.

    Attributes:
      step: the step that computed it (counted from 1).
      part: the first part that is not finite, in the order of computation.
      kept: step of the last good checkpoint; None if there is none.

    >>> import afa
    >>> print(afa.TrainingDiverged(7, "metric_loss", kept=4))
    step 7: metric_loss is not finite; training stopped, last good checkpoint: step 4
    """

    def __init__(self, step: int, part: str, kept: int | None) -> None:
        self.step, self.part, self.kept = step, part, kept
        last = "no checkpoint was written"
        if kept is not None:
            last = f"last good checkpoint: step {kept}"
        super().__init__(f"step {step}: {part} is not finite; training stopped, {last}")


def printable(text: str) -> str:
    """Returns text on one line: line breaks, control characters and invalid bytes as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(value: str, names: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the name closest to `value`, or "" if none is close."""
    match = difflib.get_close_matches(value, list(names), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def choose(field: str, value: str, table: Mapping[str, T]) -> T:
    """Looks `value` up in `table`.

    Raises:
      UserError: unknown name; the message gives the nearest and all allowed names.
    """
    if value in table:
        return table[value]
    allowed = ", ".join(sorted(table))
    raise UserError(f"{field}={value!r} is unknown{nearest(value, table)} (allowed: {allowed})")


def drop_unread() -> bool:
    """Whether standard output or error is a pipe without a reader, as after `| head -1`.

    Further output to such a pipe is discarded, also that of the interpreter at exit.
    """
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in unread:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are always reported
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):  # not a system file, or no poll
        return False
