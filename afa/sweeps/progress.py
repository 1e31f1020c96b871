"""The table of a sweep while it runs."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.box
from rich.table import Table

from afa.sweeps.sweep import Sweep
from afa.train.logging import METRICS_FILE

VALIDATION = "validation/map_at_r"
ORDER = ("running", "failed", "waiting", "done")
ROWS = 20  # runs in the table; the others are only counted
TAIL = 65536  # bytes of a log that are read


def table(sweep: Sweep, states: Mapping[str, str]) -> Table:
    """Returns the runs that are running or next, with their last step and validation MAP@R."""
    counts = Counter(states.values())
    facts = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
    shown = Table("run", "settings", "state", "step", "validation MAP@R %",
                  title=f"{len(states)} runs: {facts}", box=rich.box.SIMPLE)  # fmt: skip
    runs = {run.name: run for run in sweep.runs}
    for name in sorted(states, key=lambda name: ORDER.index(states[name]))[:ROWS]:
        step, value = latest(sweep.workdir(runs[name]).root)
        settings = " ".join(f"{key}={each}" for key, each in runs[name].changes.items())
        shown.add_row(name, settings, states[name], "" if step is None else str(step),
                      "" if value is None else f"{100 * value:.1f}")  # fmt: skip
    return shown


def latest(directory: Path) -> tuple[int | None, float | None]:
    """Returns the last logged step of a run and its last validation MAP@R; None without."""
    step = next((entry["step"] for entry in reversed(_entries(directory))), None)
    values = validation(directory)
    return step, values[max(values)] if values else None


def validation(directory: Path) -> dict[int, float]:
    """Returns step -> MAP@R on validation classes, as far as the run has logged it."""
    found = ((entry["step"], entry.get(VALIDATION)) for entry in _entries(directory))
    return {step: value for step, value in found if isinstance(value, float)}


def _entries(directory: Path) -> list[dict[str, Any]]:
    """The last entries of the log of a run; [] without a log."""
    try:
        with (directory / METRICS_FILE).open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - TAIL, 0))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off at either end
            continue
    return found
