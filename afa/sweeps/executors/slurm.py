"""Executes runs as array jobs of SLURM, by its own commands `sbatch` and `squeue`."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.io import write_json
from afa.sweeps.executors.commands import output
from afa.sweeps.executors.contract import RUN, Task

MOST = 1000  # tasks of an array; the usual limit of a cluster (MaxArraySize) is 1001
# Runs a command, passes SIGTERM on to it, and stores its exit code. A signal ends `wait` early;
# its last call returns the code of the command in any case.
SCRIPT = """#!/bin/bash
run() {{
  "$@" & child=$!
  trap 'kill -TERM "$child" 2>/dev/null' TERM
  wait "$child"
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child"; code=$?
}}
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
exit "$code"
"""
CASE = '  {index}) run {words} >> {log} 2>&1; echo "$code" > {code} ;;'


class Slurm:
    """Array jobs, one task a run.

    Submitted jobs are recorded in the directory of the sweep, before and after `sbatch`: a sweep
    that was killed between the two finds the job by its name.

    Args:
      directory: for the job scripts and the record.
      options: further words for `sbatch`, such as --gres=gpu:1 --time=4:00:00.
      command: the command of a run, before its fields.
    """

    def __init__(
        self, directory: Path, options: Sequence[str] = (), command: Sequence[str] = RUN
    ) -> None:
        self._command, self._options = list(command), list(options)
        self._directory = directory / "slurm"
        self._record = self._directory / "jobs.json"
        self._arrays: dict[str, dict[str, Any]] = {}  # job name -> number ("": unknown), tasks
        if self._record.is_file():
            self._arrays = json.loads(self._record.read_text("utf-8"))
            self._find_unrecorded()

    def _find_unrecorded(self) -> None:
        """Asks SLURM for the jobs whose number was not recorded; drops those that it has not."""
        for name in [name for name, array in self._arrays.items() if not array["job"]]:
            listed = output(
                "SLURM", "squeue", "--noheader", "--me", f"--name={name}", "--format=%A"
            )
            if found := listed.split():
                self._arrays[name]["job"] = min(found, key=int)
            else:
                del self._arrays[name]
        self._write()

    def _jobs(self) -> Mapping[str, str]:
        """Task -> JOB_INDEX of all tasks that have not ended."""
        return {task: f"{array['job']}_{index}" for array in self._arrays.values()
                for task, index in array["tasks"].items()}  # fmt: skip

    def free(self) -> int:
        return MOST - len(self._jobs())

    def start(self, tasks: Sequence[Task]) -> None:
        known = self._jobs()
        tasks = [task for task in tasks if task.name not in known]
        if not tasks:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            task.log.parent.mkdir(parents=True, exist_ok=True)
            self._code(task.name).unlink(missing_ok=True)
        text = self._script(tasks)
        name = "afa-" + hashlib.sha256(text.encode()).hexdigest()[:12]
        script = self._directory / f"{name}.sbatch"
        script.write_text(text, "utf-8")
        self._arrays[name] = {"job": "", "tasks": {task.name: i for i, task in enumerate(tasks)}}
        self._write()
        try:
            self._arrays[name]["job"] = output(
                "SLURM", "sbatch", "--parsable", f"--job-name={name}",
                f"--array=0-{len(tasks) - 1}", "--requeue", "--signal=B:TERM@120",
                f"--output={self._directory}/%A_%a.out", *self._options, str(script),
            ).strip().partition(";")[0]  # fmt: skip
        except UserError:
            del self._arrays[name]
            self._write()
            raise
        self._write()

    def ended(self) -> dict[str, int | None]:
        jobs = self._jobs()
        if not jobs:
            return {}
        listed = output("SLURM", "squeue", "--noheader", "--array", "--me", "--format=%i")
        alive = set(listed.split())
        found = {task: self._exit_code(task) for task, job in jobs.items() if job not in alive}
        if found:
            for name, array in list(self._arrays.items()):
                left = {task: i for task, i in array["tasks"].items() if task not in found}
                self._arrays[name]["tasks"] = left
                if not left:
                    del self._arrays[name]
            self._write()
        return found

    def cancel(self, name: str) -> None:
        if job := self._jobs().get(name):
            output("SLURM", "scancel", "--signal=TERM", "--batch", job)

    def stop(self) -> None:
        """Jobs go on without the sweep; the same command finds them again."""

    def _write(self) -> None:
        write_json(self._record, self._arrays)

    def _code(self, task: str) -> Path:
        return self._directory / f"{task}.code"

    def _exit_code(self, task: str) -> int | None:
        """The stored exit code; None for a task that SLURM ended or that has not started."""
        try:
            return int(self._code(task).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _script(self, tasks: Sequence[Task]) -> str:
        cases = []
        for index, task in enumerate(tasks):
            log, code = (shlex.quote(str(path)) for path in (task.log, self._code(task.name)))
            words = shlex.join([*self._command, *task.words])
            cases.append(CASE.format(index=index, words=words, log=log, code=code))
        return SCRIPT.format(cases="\n".join(cases))
