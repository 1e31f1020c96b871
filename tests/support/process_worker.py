"""Run by test_processes.py: one of two processes that start several runs in sequence.

python process_worker.py DIR DATA INDEX PORT

The address of the other process is set in the recipe, not on the command line. The results of all
runs are written to DIR/INDEX.json; the exit code is that of the complete run.
"""

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tiny_run

from afa import parallel
from afa.config import ExperimentConfig, with_changes
from afa.errors import UserError
from experiments.configs import debug

ROWS = (1, 2, 5, 8)
# F only, with SGD, because Adam turns the rounding of a gradient near zero into a full step.
SETTINGS: dict[str, Any] = {
    "adversarial.enabled": False,
    "optim.name": "sgd",
    "optim.learning_rate": "0.02",
    "train.steps": "6",
} | dict.fromkeys([
    "train.plain", "train.generator_steps", "generator.width", "generator.levels",
    "generator.latent_dim", "discriminator.width", "discriminator.levels",
])  # fmt: skip


def words(data: Path, workdir: Path, **changes: Any) -> list[str]:
    """Returns the command line of a run that trains only F."""
    return tiny_run.words(data, workdir, **(SETTINGS | changes))


def command(line: list[str]) -> dict[str, Any]:
    """Runs a command in this process; returns exit code, output and seconds."""
    out, err, began = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tiny_run.main(*line)
    seconds = time.perf_counter() - began
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds}


def error_of(action: Callable[[], Any]) -> str:
    """Returns the message of a user error; "" without one."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def failing(index: int) -> Callable[[], int]:
    """Returns an action that fails in one process."""

    def action() -> int:
        if parallel.process_index() == index:
            raise UserError(f"process {index} cannot")
        return 10 + parallel.process_index()

    return action


def skew_of(seconds: float) -> float:
    """Returns the difference between the clocks with this one set forward."""
    with mock.patch("time.time", lambda now=time.time: now() + seconds):
        return parallel.clock_skew()


def messages() -> dict[str, Any]:
    """Results of communication between the processes, and the division of rows."""
    index, found = parallel.process_index(), {}
    for rows in ROWS:
        full = {"x": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2), "n": np.arange(rows)}
        own = parallel.share(rows)
        part = {name: each[own] for name, each in full.items()}
        joined = parallel.gather_shares(part, rows)
        found[str(rows)] = [
            [own.start, own.stop], {k: np.asarray(v).tolist() for k, v in joined.items()}
        ]  # fmt: skip
    return {
        "processes": [parallel.process_count(), index],
        "rows": found,
        "together": [
            parallel.together(failing(2)),
            error_of(lambda: parallel.together(failing(0))),
            error_of(lambda: parallel.together(failing(1))),
        ],
        "first_only": [
            parallel.first_only(lambda: index + 1),
            error_of(lambda: parallel.first_only(failing(0))),
        ],
        "clock_skew": skew_of(100.5 * index),
        "from_first": parallel.from_first({"index": index, "text": "å", "list": [1.5, None]}),
    }


def main() -> int:
    folder, data = map(Path, sys.argv[1:3])
    index, port = map(int, sys.argv[3:])
    launch = {"coordinator": f"localhost:{port}", "processes": 2, "index": index}
    original = debug.config

    def config(laptop: bool) -> ExperimentConfig:
        return with_changes(original(laptop), **{f"launch.{k}": v for k, v in launch.items()})

    debug.config = config
    line = words(data, folder / "run")
    found = {"run": command(line), "changed": command([*line, "--seed=1"])}
    found |= messages()
    (folder / f"{index}.json").write_text(json.dumps(found))
    return found["run"]["code"]


if __name__ == "__main__":
    sys.exit(main())
