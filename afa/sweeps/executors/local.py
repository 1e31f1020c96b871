"""Executes runs on this machine: one per accelerator, or several on the cores, each pinned."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from afa.sweeps.executors.contract import Task

SET_DEATH_SIGNAL = 1  # prctl(PR_SET_PDEATHSIG, ...)
DEVICES = "import jax; print(jax.default_backend(), jax.local_device_count())"
VISIBLE = {"gpu": "CUDA_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}


class Local:
    """Processes of this machine.

    Args:
      processes: runs at a time; 0: one per accelerator, or one without an accelerator. On CPUs, the
        cores are divided among them.
    """

    def __init__(self, processes: int = 0) -> None:
        platform, count = _devices()
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
                    [sys.executable, "-m", "experiments.run", *task.words],
                    env={**os.environ, **self._environments[slot]},
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which stops the runs
                    preexec_fn=_bound(self._cores[slot], os.getpid()),
                )  # fmt: skip
            self._running[slot] = task, process

    def ended(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for slot, (task, process) in list(self._running.items()):
            if process.poll() is not None:
                found[task.name] = process.returncode
                del self._running[slot]
        return found

    def stop(self) -> None:
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)  # a run saves its state
        for _, process in self._running.values():
            process.wait()


def _bound(cores: set[int], parent: int):
    """Returns a function that pins the new process to cores and ends it with the sweep, even if the
    sweep is killed: SIGTERM lets it save its state."""
    library = ctypes.CDLL(None, use_errno=True)

    def bind() -> None:
        os.sched_setaffinity(0, cores)
        library.prctl(SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before the call above
            os._exit(1)

    return bind


def _devices() -> tuple[str, int]:
    """Platform and number of devices, asked in another process: JAX reserves them."""
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True)
    platform, _, count = done.stdout.strip().rpartition(" ")
    return (platform, int(count)) if done.returncode == 0 else ("cpu", 1)
