"""Executes runs as managed jobs of SkyPilot, by its own command `sky`: clouds and Kubernetes.

The task file (`launch/sky.yaml`) says which machines are used, how they are set up, and where the
store is mounted; it runs the command in the variable AFA_COMMAND. SkyPilot restarts a job whose
machine was taken away, and the run continues from its checkpoint in the store.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from afa.io import write_json
from afa.sweeps.executors.commands import output
from afa.sweeps.executors.contract import Task

SYSTEM = "SkyPilot"
TASK = "launch/sky.yaml"
RUN = ("python", "-m", "experiments.run")  # on a machine whose interpreter is not known here
MOST = 100  # jobs at a time
ENDED = {
    "SUCCEEDED": 0, "CANCELLED": None, "FAILED": 1, "FAILED_SETUP": 1, "FAILED_PRECHECKS": 1,
    "FAILED_NO_RESOURCE": 1, "FAILED_CONTROLLER": 1,
}  # fmt: skip


class Sky:
    """Managed jobs, one a run, named by the run and the number of the attempt.

    A job is recorded before it is launched: a sweep killed in between finds it by its name.

    Args:
      directory: of the sweep, for the record.
      options: further words for `sky jobs launch`, such as --infra=gcp; the last may be a task file
        (default: launch/sky.yaml).
      command: the command of a run, before its fields.
    """

    def __init__(
        self, directory: Path, options: Sequence[str] = (), command: Sequence[str] = RUN
    ) -> None:
        words = list(options)
        own = bool(words) and words[-1].endswith((".yaml", ".yml"))
        self._file = words.pop() if own else TASK
        self._options, self._command = words, list(command)
        self._record = directory / "sky" / "jobs.json"
        self._attempts: dict[str, int] = {}  # task -> number of its last attempt
        self._running: set[str] = set()
        if self._record.is_file():
            stored = json.loads(self._record.read_text("utf-8"))
            self._attempts, self._running = stored["attempts"], set(stored["running"])
            self._drop_unlaunched()

    def _drop_unlaunched(self) -> None:
        known = self._states() if self._running else {}
        for task in [task for task in self._running if self._job(task) not in known]:
            self._forget(task)
        self._write()

    def _forget(self, task: str) -> None:
        self._attempts[task] -= 1
        self._running.discard(task)

    def free(self) -> int:
        return MOST - len(self._running)

    def start(self, tasks: Sequence[Task]) -> None:
        tasks = [task for task in tasks if task.name not in self._running]
        if not tasks:
            return
        for task in tasks:
            self._attempts[task.name] = self._attempts.get(task.name, 0) + 1
            self._running.add(task.name)
        self._write()
        known = self._states()
        for task in tasks:
            if self._job(task.name) not in known:
                self._launch(task)

    def _launch(self, task: Task) -> None:
        words = shlex.join([*self._command, *task.words])
        try:
            output(
                SYSTEM, "sky", "jobs", "launch", "--yes", "--detach-run",
                f"--name={self._job(task.name)}", f"--env=AFA_COMMAND={words}", *self._options,
                self._file,
            )  # fmt: skip
        except BaseException:
            self._forget(task.name)
            self._write()
            raise
        task.log.parent.mkdir(parents=True, exist_ok=True)
        task.log.write_text(f"sky jobs logs --name={self._job(task.name)} prints the output\n")

    def ended(self) -> dict[str, int | None]:
        if not self._running:
            return {}
        states = self._states()
        named = {task: states.get(self._job(task), "") for task in sorted(self._running)}
        found = {task: ENDED[state] for task, state in named.items() if state in ENDED}
        if found:
            self._running -= set(found)
            self._write()
        return found

    def cancel(self, name: str) -> None:
        output(SYSTEM, "sky", "jobs", "cancel", "--yes", f"--name={self._job(name)}")

    def stop(self) -> None:
        """Jobs go on without the sweep; the same command finds them again."""

    def _job(self, task: str) -> str:
        return f"{task.replace('_', '-')}-{self._attempts[task]}"

    def _states(self) -> dict[str, str]:
        listed = output(SYSTEM, "sky", "jobs", "queue", "--all", "--output=json")
        return {row["job_name"]: row["status"] for row in json.loads(listed or "[]")}

    def _write(self) -> None:
        write_json(self._record, {"attempts": self._attempts, "running": sorted(self._running)})
