"""Executes runs as array jobs of SLURM, by its own commands `sbatch` and `squeue`."""

import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from afa.errors import UserError
from afa.io import write_json
from afa.sweeps.executors.contract import RUN, Task

MOST = 1000  # tasks of an array; the usual limit of a cluster (MaxArraySize) is 1001


class Slurm:
    """Array jobs, one task a run.

    Submitted jobs are recorded in the directory of the sweep: one that was killed finds them again.

    Args:
      directory: for the job scripts and the record.
      options: further words for `sbatch`, such as --gres=gpu:1 --time=4:00:00.
      command: the command of a run, before its fields.
    """

    def __init__(
        self, directory: Path, options: Sequence[str] = (), command: Sequence[str] = RUN
    ) -> None:
        self._command = list(command)
        self._directory, self._options = directory / "slurm", list(options)
        self._record = self._directory / "jobs.json"
        self._jobs: dict[str, str] = {}  # task -> JOB_INDEX
        if self._record.is_file():
            self._jobs = json.loads(self._record.read_text("utf-8"))

    def free(self) -> int:
        return MOST - len(self._jobs)

    def start(self, tasks: Sequence[Task]) -> None:
        tasks = [task for task in tasks if task.name not in self._jobs]
        if not tasks:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        script = self._directory / f"{tasks[0].name}.sbatch"
        script.write_text(_script(tasks, self._command), "utf-8")
        job = _command(
            "sbatch", "--parsable", f"--array=0-{len(tasks) - 1}", "--requeue",
            "--signal=B:TERM@120", f"--output={self._directory}/%A_%a.out", *self._options,
            str(script),
        ).strip().partition(";")[0]  # fmt: skip
        self._jobs |= {task.name: f"{job}_{index}" for index, task in enumerate(tasks)}
        write_json(self._record, self._jobs)

    def ended(self) -> dict[str, int | None]:
        if not self._jobs:
            return {}
        listed = _command("squeue", "--noheader", "--array", "--me", "--format=%i")
        waiting = set(listed.split())
        found: dict[str, int | None] = {
            name: None for name, job in self._jobs.items() if job not in waiting
        }
        if found:
            self._jobs = {n: job for n, job in self._jobs.items() if n not in found}
            write_json(self._record, self._jobs)
        return found

    def stop(self) -> None:
        """Jobs go on without the sweep; the same command finds them again."""


def _script(tasks: Sequence[Task], command: Sequence[str]) -> str:
    lines = ["#!/bin/bash", "case $SLURM_ARRAY_TASK_ID in"]
    for index, task in enumerate(tasks):
        words = shlex.join([*command, *task.words])
        log = shlex.quote(str(task.log))
        lines.append(f"  {index}) exec {words} >> {log} 2>&1 ;;")
    return "\n".join([*lines, "esac", ""])


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not found: this machine has no SLURM") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} does not answer; is the SLURM controller up?") from None
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{words[0]}: {reason}")
    return done.stdout
