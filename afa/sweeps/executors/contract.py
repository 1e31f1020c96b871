"""What a sweep needs of an executor."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

RUN = (sys.executable, "-m", "experiments.run")


@dataclass(frozen=True)
class Task:
    """A run to be executed.

    Attributes:
      name: of the run.
      words: fields of the command `python -m experiments.run`.
      log: file for its output.
    """

    name: str
    words: Sequence[str]
    log: Path


@runtime_checkable
class Executor(Protocol):
    """Executes tasks; a task that an earlier, killed sweep started must not be started twice."""

    def start(self, tasks: Sequence[Task]) -> None:
        """Starts or submits tasks, at most `free()` of them."""
        ...

    def free(self) -> int:
        """Returns how many more tasks can be started now."""
        ...

    def ended(self) -> dict[str, int | None]:
        """Returns the tasks that have ended since the last call: name -> exit code, or None if it
        is unknown."""
        ...

    def cancel(self, name: str) -> None:
        """Stops a task; `ended` reports it when it has ended."""
        ...

    def stop(self) -> None:
        """Stops all tasks such that they can be resumed, and waits for them."""
        ...
