"""Executors: where the runs of a sweep are executed. One file each, and one line of `EXECUTORS`."""

from afa.sweeps.executors.local import Local
from afa.sweeps.executors.slurm import Slurm

EXECUTORS = {"local": Local, "slurm": Slurm}
