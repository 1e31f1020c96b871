"""Metrics of a run on disk: metrics.jsonl, TensorBoard events, result.json, Parquet.

result.json and the Parquet file are written atomically. JSON has no NaN and no infinity: they are
written as the strings "NaN", "Infinity" and "-Infinity".
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import numpy as np

from afa import io
from afa.workdir import PER_QUERY_FILE

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
EVENTS_FOLDER = "tensorboard"
EVENTS_FLUSH_SECONDS = 10
FIXED_KEYS = ("step", "time", "stage")
NON_FINITE = frozenset({"NaN", "Infinity", "-Infinity"})


class MetricWriter:
    """Appends metrics to metrics.jsonl and mirrors them into TensorBoard events.

    Args:
      workdir: the run's directory; created if missing.
      resume_step: step of the checkpoint from which the run resumes. Later log lines of an earlier
        process are deleted, because their steps are computed again; 0 deletes all.
    """

    def __init__(self, workdir: Path | str, resume_step: int) -> None:
        # A late import: commands that only read or search do not need it.
        from tensorboardX import SummaryWriter

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        _drop_after(path, resume_step)
        self._lines = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(
            str(workdir / EVENTS_FOLDER),
            purge_step=resume_step + 1 if resume_step else 0,
            flush_secs=EVENTS_FLUSH_SECONDS,
            # The default file name has a resolution of 1 s: a quick restart would overwrite it.
            filename_suffix=f".{resume_step}.{time.time_ns()}",
        )

    def log(self, step: int, stage: str, metrics: Mapping[str, SupportsFloat]) -> None:
        """Writes one line {"step", "time" (seconds since 1970), "stage", name: value, ...}.

        Raises:
          ValueError: a metric has the name of a fixed key.
        """
        taken = [name for name in FIXED_KEYS if name in metrics]
        if taken:
            raise ValueError(f"a metric must not be called {taken[0]!r}")
        values = {name: float(value) for name, value in metrics.items()}
        now = time.time()
        line = {"step": int(step), "time": round(now, 3), "stage": stage, **values}
        self._lines.write(json.dumps(io.plain(line), allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step, walltime=now)

    def flush(self) -> None:
        """Syncs everything logged so far to disk; called with each checkpoint."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._events.flush()

    def close(self) -> None:
        """Writes buffered events and closes the files."""
        self._lines.close()
        self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_history(workdir: Path | str) -> list[dict[str, Any]]:
    """Reads metrics.jsonl, with NaN and infinities as floats; [] if there is no file."""
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    with path.open("rb") as lines:
        return [
            {name: value if name == "stage" else _number(value) for name, value in entry.items()}
            for _, entry in _entries(lines)
        ]


def write_result(
    workdir: Path | str, result: Mapping[str, Any], per_query: Mapping[str, Any]
) -> None:
    """Writes per_query.parquet, then result.json; if the latter exists, the former is complete.

    Args:
      workdir: the run's directory.
      result: config, commit, data, metrics, timings.
      per_query: column name -> n values (n the same for all; an (n, k) array gives lists).
    """
    import pyarrow
    import pyarrow.parquet

    columns = {name: list(c) if np.ndim(c) > 1 else c for name, c in per_query.items()}
    rows = pyarrow.table(columns)
    path = Path(workdir) / PER_QUERY_FILE
    io.write_atomically(path, lambda file: pyarrow.parquet.write_table(rows, file))
    io.write_json(Path(workdir) / RESULT_FILE, result)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in NON_FINITE else value


def _entries(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the valid lines and their content; skips a line truncated by a kill."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(entry, dict) and "step" in entry:
            yield line, entry


def _drop_after(path: Path, step: int) -> None:
    """Deletes invalid lines and those after `step` (0: all lines)."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        kept = [line for line, entry in _entries(lines) if step and entry["step"] <= step]
    content = b"".join(kept)
    if len(content) != path.stat().st_size:
        io.write_bytes(path, content)
