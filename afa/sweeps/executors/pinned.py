"""Replaces itself by a command, pinned to cores and ended with the process that started it.

    python pinned.py PARENT CORES COMMAND...

PARENT is the process id of the starter, CORES are numbers joined by commas. If the starter ends,
even killed, the command gets SIGTERM, so that it can save its state. A program of its own because
JAX does not survive code that runs between fork and exec.
"""

import ctypes
import os
import signal
import sys

SET_DEATH_SIGNAL = 1  # prctl(PR_SET_PDEATHSIG, ...)


def main(parent: str, cores: str, *command: str) -> None:
    """Runs the command in place of this process."""
    os.sched_setaffinity(0, map(int, cores.split(",")))
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before the call above
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
