"""Executes runs on this machine: one per accelerator, or several on the cores, each pinned."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from afa.sweeps import devices
from afa.sweeps.executors import pinned
from afa.sweeps.executors.contract import RUN, Task

VISIBLE = {"gpu": "CUDA_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}


class Local:
    """Processes of this machine.

    Args:
      processes: runs at a time; 0: one per accelerator, or one without an accelerator. On CPUs, the
        cores are divided among them.
      command: the command of a run, before its fields.
    """

    def __init__(self, processes: int = 0, command: Sequence[str] = RUN) -> None:
        self._command = list(command)
        platform, count = devices.found()
        accelerated = platform in VISIBLE
        slots = processes or (count if accelerated else 1)
        self._running: dict[int, tuple[Task, subprocess.Popen]] = {}
        self._environments: list[Mapping[str, str]] = []
        self._cores: list[set[int]] = []
        cores = sorted(os.sched_getaffinity(0))
        for slot in range(slots):
            own = {VISIBLE[platform]: str(slot % count)} if accelerated else {}
            self._environments.append(own)
            shared = accelerated or slots > len(cores)
            self._cores.append(set(cores) if shared else set(cores[slot::slots]))

    def free(self) -> int:
        return len(self._cores) - len(self._running)

    def start(self, tasks: Sequence[Task]) -> None:
        idle = [slot for slot in range(len(self._cores)) if slot not in self._running]
        for slot, task in zip(idle, tasks, strict=False):
            task.log.parent.mkdir(parents=True, exist_ok=True)
            with task.log.open("ab") as log:
                process = subprocess.Popen(
                    [*self._pinned(slot), *self._command, *task.words],
                    env={**os.environ, **self._environments[slot]},
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which stops the runs
                )  # fmt: skip
            self._running[slot] = task, process

    def _pinned(self, slot: int) -> list[str]:
        """The start of a command that is on the cores of the slot and ends with this process."""
        cores = ",".join(map(str, sorted(self._cores[slot])))
        return [sys.executable, pinned.__file__, str(os.getpid()), cores]

    def ended(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for slot, (task, process) in list(self._running.items()):
            if process.poll() is not None:
                found[task.name] = process.returncode
                del self._running[slot]
        return found

    def cancel(self, name: str) -> None:
        for task, process in self._running.values():
            if task.name == name:
                process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)  # a run saves its state
        for _, process in self._running.values():
            process.wait()
