"""Executes a sweep: starts what is not done, retries a failed run once, and keeps a table."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa.errors import EXIT_PREEMPTED, UserError
from afa.io import locked, write_json
from afa.sweeps.executors.contract import Executor, Task
from afa.sweeps.plan import Planned
from afa.workdir import DISK_ERRORS, Workdir

ATTEMPTS = 2
PAUSE = 0.5  # seconds between two looks at the executor


@dataclass(frozen=True)
class Sweep:
    """A planned sweep and where its files are.

    Attributes:
      runs: planned runs.
      out: directory of the sweep: plan.json, failures.json, sweep.json, logs.
      store: directory of all run directories, shared by sweeps: a run is done once.
    """

    runs: Sequence[Planned]
    out: Path
    store: Path

    def workdir(self, run: Planned) -> Workdir:
        """Returns the directory of a run: that of a finished run of equal hash, if there is one."""
        own = Workdir(self.store / run.name)
        if own.result.is_file():
            return own
        equal = sorted(self.store.glob(f"*-{run.digest}/result.json"))
        return Workdir(equal[0].parent) if equal else own

    def busy(self, run: Planned) -> bool:
        """Whether a process works in the directory of a run: after a sweep was killed, its runs may
        still be saving their state."""
        lock = self.store / run.name / ".lock"
        if not lock.is_file():
            return False
        try:
            with locked(lock, busy=""):
                return False
        except UserError:
            return True

    def done(self) -> list[Planned]:
        return [run for run in self.runs if self.workdir(run).result.is_file()]

    def claim(self) -> None:
        """Stores the plan, or checks it against the stored one.

        Raises:
          UserError: the directory holds another plan.
        """
        path = self.out / "plan.json"
        rows = [
            {"name": run.name, "exp": run.exp, "scale": run.scale, "changes": run.changes}
            for run in self.runs
        ]
        rows = json.loads(json.dumps(rows))
        if not path.is_file():
            write_json(path, {"runs": rows})
            return
        stored = _read(path)["runs"]
        if stored != rows:
            before, now = ({row["name"] for row in each} for each in (stored, rows))
            raise UserError(
                f"--out={self.out} contains another plan: {len(before - now)} of its runs are not "
                f"in this one, {len(now - before)} are new (choose another --out)"
            )

    def failures(self) -> dict[str, list[str]]:
        """Returns name -> reason of every failed attempt."""
        return _read(self.failure_list) if self.failure_list.is_file() else {}

    @property
    def failure_list(self) -> Path:
        return self.out / "failures.json"

    @property
    def summary(self) -> Path:
        return self.out / "sweep.json"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error})") from None


@contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Reports a full or read-only disk as a user error."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"--out={out}: cannot be written ({error.strerror}); fix this and run the same command "
            "again to continue"
        ) from error


def execute(
    sweep: Sweep, executor: Executor, show: Callable[[dict[str, str]], None]
) -> dict[str, str]:
    """Executes all runs that are not done; returns the state of each: "done" or "failed".

    Args:
      show: called with name -> state ("waiting", "running", "done", "failed") after every change.

    Raises:
      UserError: another process executes the sweep, or the directory holds another plan.
    """
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
        sweep.store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={sweep.out}: cannot be created ({error.strerror})") from None
    busy = f"--out={sweep.out}: another process executes this sweep"
    with locked(sweep.out / ".lock", busy=busy):
        sweep.claim()
        if sweep.summary.is_file():  # the last command came to its end: failed runs start anew
            sweep.failure_list.unlink(missing_ok=True)
            sweep.summary.unlink()
        try:
            return _loop(sweep, executor, show)
        except BaseException:
            executor.stop()
            raise


def _loop(
    sweep: Sweep, executor: Executor, show: Callable[[dict[str, str]], None]
) -> dict[str, str]:
    runs = {run.name: run for run in sweep.runs}
    failures = sweep.failures()
    states = dict.fromkeys(runs, "waiting")
    for run in sweep.done():
        states[run.name] = "done"
    for name, reasons in failures.items():
        if len(reasons) >= ATTEMPTS and states.get(name) == "waiting":
            states[name] = "failed"
    show(states)
    while set(states.values()) - {"done", "failed"}:
        for name, code in executor.ended().items():
            if name in runs:
                states[name] = _state_of(sweep, runs[name], code, failures)
        waiting = (name for name, state in states.items() if state == "waiting")
        idle = (name for name in waiting if not sweep.busy(runs[name]))
        chosen = list(itertools.islice(idle, max(executor.free(), 0)))
        executor.start([task_of(sweep, runs[name]) for name in chosen])
        states |= dict.fromkeys(chosen, "running")
        show(states)
        time.sleep(PAUSE)
    return states


def task_of(sweep: Sweep, run: Planned) -> Task:
    """Returns a run as a task of an executor."""
    home = sweep.store / run.name
    words = [*run.words(), f"--workdir={home}"]
    return Task(run.name, words, sweep.out / "logs" / f"{run.name}.log")


def _state_of(sweep: Sweep, run: Planned, code: int | None, failures: dict[str, list[str]]) -> str:
    """State of a run whose process has ended; records a failure."""
    if Workdir(sweep.store / run.name).result.is_file():
        return "done"
    if code == EXIT_PREEMPTED:
        return "waiting"
    failures.setdefault(run.name, []).append(reason_of(sweep.out, run.name, code))
    write_json(sweep.failure_list, failures)
    return "failed" if len(failures[run.name]) >= ATTEMPTS else "waiting"


def reason_of(out: Path, name: str, code: int | None) -> str:
    """Returns why a run failed, in one line: the last of its output, and its exit code."""
    log = out / "logs" / f"{name}.log"
    lines = log.read_text("utf-8", "replace").strip().splitlines() if log.is_file() else []
    ended = "ended without an exit code" if code is None else f"exit code {code}"
    return f"{lines[-1] if lines else 'no output'} ({ended})"


def summarise(sweep: Sweep) -> dict[str, Any]:
    """Content of sweep.json: settings and metrics of every finished run, and the failed runs. It
    holds no times, so that it depends on the plan alone."""
    rows = []
    for run in sweep.runs:
        result = sweep.workdir(run).result
        if result.is_file():
            metrics = _read(result)["metrics"]
            rows.append({"name": run.name, "exp": run.exp, "changes": run.changes,
                         "metrics": metrics["test"]})  # fmt: skip
    done = {row["name"] for row in rows}
    failed = {name: reasons for name, reasons in sweep.failures().items() if name not in done}
    return json.loads(json.dumps({"runs": rows, "failed": failed}))
