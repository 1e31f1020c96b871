"""Run by test_processes.py: one of two processes that make several runs, one after another.

python process_worker.py DIR DATA INDEX PORT

The recipe says where the other process is, so no command line does. What comes of every run is
written to DIR/INDEX.json; the exit code is that of the complete run.
"""

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_run

from afa import parallel
from afa.config import ExperimentConfig, with_changes
from afa.errors import UserError
from experiments.configs import debug

ROWS = (1, 2, 5, 8)
# F alone, moved by SGD: Adam turns the rounding of a gradient near zero into a whole step.
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
    """The command line of a run of F alone."""
    return tiny_run.words(data, workdir, **(SETTINGS | changes))


def command(line: list[str]) -> dict[str, Any]:
    """What comes of a command in this process: exit code, what it says, and seconds."""
    out, err, began = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tiny_run.main(*line)
    seconds = time.perf_counter() - began
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds}


def said(action: Callable[[], Any]) -> str:
    """The message of a user's mistake; "" without one."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def mistake(of: int) -> Callable[[], int]:
    """An action that only one of the processes cannot do."""

    def action() -> int:
        if parallel.process_index() == of:
            raise UserError(f"process {of} cannot")
        return 10 + parallel.process_index()

    return action


def messages() -> dict[str, Any]:
    """What the processes tell each other, and the rows that they share."""
    index, found = parallel.process_index(), {}
    for rows in ROWS:
        whole = {"x": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2), "n": np.arange(rows)}
        mine = parallel.share(rows)
        part = {name: each[mine] for name, each in whole.items()}
        joined = parallel.gather_shares(part, rows)
        found[str(rows)] = [
            [mine.start, mine.stop], {k: np.asarray(v).tolist() for k, v in joined.items()}
        ]  # fmt: skip
    return {
        "processes": [parallel.process_count(), index],
        "rows": found,
        "together": [
            parallel.together(mistake(2)),
            said(lambda: parallel.together(mistake(0))),
            said(lambda: parallel.together(mistake(1))),
        ],
        "first_only": [
            parallel.first_only(lambda: index + 1),
            said(lambda: parallel.first_only(mistake(0))),
        ],
        "from_first": parallel.from_first({"index": index, "text": "å", "list": [1.5, None]}),
    }


def main() -> int:
    folder, data = map(Path, sys.argv[1:3])
    index, port = map(int, sys.argv[3:])
    launch = {"coordinator": f"localhost:{port}", "processes": 2, "index": index}
    usual = debug.config

    def config(laptop: bool) -> ExperimentConfig:
        return with_changes(usual(laptop), **{f"launch.{k}": v for k, v in launch.items()})

    debug.config = config
    line = words(data, folder / "run")
    found = {"run": command(line), "changed": command([*line, "--seed=1"])}
    found |= messages()
    (folder / f"{index}.json").write_text(json.dumps(found))
    return found["run"]["code"]


if __name__ == "__main__":
    sys.exit(main())
