"""Stands in for `experiments.run` in tests of sweeps: `sweep_worker.py FIELDS --workdir=DIR`.

Appends a line to DIR/started, logs a score, waits, and writes DIR/result.json. SIGTERM ends it with
the exit code of a preempted run. With `--seed=13` it fails, with `--seed=14` it does not end by
itself, and with `--seed=15` its first three starts end as preempted ones.
"""

import json
import math
import signal
import sys
import time
from pathlib import Path

from afa.errors import EXIT_PREEMPTED, EXIT_USER_ERROR
from afa.io import locked, write_json

COMMAND = (sys.executable, __file__)
SECONDS = 0.3
PREEMPTIONS = 3


def main(words: list[str]) -> int:
    fields = dict(word[2:].split("=", 1) for word in words)
    home = Path(fields.pop("workdir"))  # not `afa.workdir.Workdir`, which imports JAX
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / ".lock"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_PREEMPTED))
        with (home / "started").open("a") as file:
            file.write("x\n")
        if "optim.learning_rate" in fields:
            _log(home, float(fields["optim.learning_rate"]))
        if fields["seed"] == "13":
            print("error: seed 13 is unlucky", flush=True)
            return EXIT_USER_ERROR
        if fields["seed"] == "15" and len((home / "started").read_text()) <= 2 * PREEMPTIONS:
            return EXIT_PREEMPTED
        time.sleep(3600 if fields["seed"] == "14" else SECONDS)
        assert not (home / "result.json").exists(), "a finished run was started again"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        write_json(home / "result.json", {"metrics": {"test": {"fused": fields}}})
    return 0


def _log(home: Path, rate: float) -> None:
    """Logs a MAP@R on validation classes that is best for a learning rate of 1e-3."""
    best = 0.9 - 0.2 * abs(math.log10(rate) + 3)
    lines = (json.dumps({"step": step, "validation/map_at_r": best * step / 4}) for step in (2, 4))
    (home / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
