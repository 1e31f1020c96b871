"""Executors: where the runs of a sweep are executed. One file each, and one line of `EXECUTORS`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from afa.errors import choose
from afa.sweeps.executors.contract import Executor
from afa.sweeps.executors.local import Local
from afa.sweeps.executors.sky import Sky
from afa.sweeps.executors.slurm import Slurm

# Name -> executor from the directory of the sweep, the number of processes and further options.
EXECUTORS: dict[str, Callable[[Path, int, Sequence[str]], Executor]] = {
    "local": lambda directory, processes, options: Local(processes),
    "slurm": lambda directory, processes, options: Slurm(directory, options),
    "sky": lambda directory, processes, options: Sky(directory, options),
}


def create(name: str, directory: Path, processes: int, options: Sequence[str]) -> Executor:
    """Returns an executor.

    Raises:
      UserError: an unknown name.
    """
    return choose("executor", name, EXECUTORS)(directory, processes, options)
