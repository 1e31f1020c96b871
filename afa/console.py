"""Console output of a run: a live line on a terminal, plain lines in a log, result tables."""

import collections
import contextlib
import io
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import SupportsFloat, TypeVar

import rich.box
from rich import progress
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LOSS = "loss"  # the first metric of the line; all others follow in the caller's order
RATE_WINDOW = 30  # updates whose mean speed predicts the time left
BAR_WIDTH = 24
LIVE_INTERVAL = 0.1  # seconds between updates of the live line
TABLE_WIDTH = 400  # wider than any table, so that lines are never wrapped
BLANK = "\N{EN DASH}"

Cell = str | int | float | None
T = TypeVar("T")


def quiet() -> None:
    """Hides log messages of libraries below errors."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)


def duration(seconds: int | float) -> str:
    """Formats seconds: `8s`, `3m 05s`, `2h 07m`, `4d 03h`."""
    if not math.isfinite(seconds):
        return BLANK
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    if hours:
        return f"{hours}h {minute:02d}m"
    return f"{minutes}m {second:02d}s" if minutes else f"{second}s"


def figure(value: int | float) -> str:
    """Formats a number with about four significant digits, without exponent where possible."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 0 if value == 0 else 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(digits, 0), 4)}f}"


@contextlib.contextmanager
def bar(description: str, total: int, least: int = 0) -> Iterator[Callable[[], object]]:
    """Shows a progress bar on a terminal while the context is open; yields a function to call after
    every item. `least` is the total below which nothing is shown."""
    console = Console(stderr=True)
    if total < least or not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with progress.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(description, total=total)
        yield lambda: shown.advance(task)


def track(items: Iterable[T], description: str, total: int, least: int = 0) -> Iterator[T]:
    """Yields the items and shows a `bar`."""
    with bar(description, total, least) as advance:
        for item in items:
            yield item
            advance()


@contextlib.contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows a line on a terminal while the context is open; yields a function that changes it."""
    console = Console(stderr=True)
    if not console.is_terminal:  # rich before 14.3 writes an empty line there
        yield lambda text: None
        return
    with console.status(text) as shown:
        yield shown.update


class Progress:
    """Progress line of a run; a context manager.

    A terminal shows one live line. Otherwise a plain line without control codes is printed at most
    every `interval` seconds, and always for the first and last step and the first step of a stage.

    Args:
      total_steps: last step of the run.
      stages: names of the stages in order; shown as `2/3 name`.
      interval: minimum seconds between two plain lines.
    """

    def __init__(self, total_steps: int, *stages: str, interval: int | float = 10) -> None:
        self._total, self._stages, self._interval = total_steps, stages, interval
        self._file = sys.stdout
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=RATE_WINDOW)
        self._printed, self._stage = -math.inf, ""
        self._live: Live | None = None
        if self._file.isatty():
            self._live = Live(console=Console(file=self._file), auto_refresh=False)

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.refresh()
            self._live.stop()

    def update(
        self,
        step: int,
        stage: str,
        metrics: Mapping[str, SupportsFloat],
        images_per_second: SupportsFloat,
    ) -> None:
        """Shows the metrics after `step` (counted from 1); cheap enough for every log step."""
        now = time.monotonic()
        self._seen.append((now, step))
        due = stage != self._stage or step >= self._total
        self._stage = stage
        if now - self._printed < (LIVE_INTERVAL if self._live else self._interval) and not due:
            return
        self._printed = now
        facts = self._facts(step, metrics, float(images_per_second))
        others = [f"{k} {figure(float(v))}" for k, v in metrics.items() if k != LOSS]
        if self._live is None:
            head = f"{self._name(stage)}  step {step:>{len(str(self._total))}}/{self._total}"
            print("  ".join([head, *facts, *others]), file=self._file, flush=True)
            return
        self._live.update(self._drawing(step, facts, others), refresh=True)

    def note(self, text: str) -> None:
        """Prints a line of text; on a terminal it stays above the live line."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._file, flush=True)

    def _name(self, stage: str) -> str:
        if stage not in self._stages:
            return stage
        width = max(len(name) for name in self._stages)
        return f"{self._stages.index(stage) + 1}/{len(self._stages)} {stage:<{width}}"

    def _facts(self, step: int, metrics: Mapping[str, SupportsFloat], rate: float) -> list[str]:
        loss = [f"{LOSS} {float(metrics[LOSS]):.4f}"] if LOSS in metrics else []
        return [*loss, f"{rate:,.0f} images/s", f"ETA {duration(self._seconds_left(step))}"]

    def _seconds_left(self, step: int) -> float:
        """Remaining steps times the recent time per step; NaN before the second update.

        The window starts after the first update, so it excludes compilation. It includes
        evaluations between updates.
        """
        (then, first), (now, _) = self._seen[0], self._seen[-1]
        if step <= first:
            return 0.0 if step >= self._total else math.nan
        return (self._total - step) * (now - then) / (step - first)

    def _drawing(self, step: int, facts: Sequence[str], others: Sequence[str]) -> Group:
        done = round(BAR_WIDTH * min(step / max(self._total, 1), 1.0))
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{self._name(self._stage)} ", style="bold")
        line.append("━" * done, style="cyan").append("━" * (BAR_WIDTH - done), style="bright_black")
        line.append(f" {step}/{self._total}  " + "  ".join(facts))
        rest = Text("  ".join(others), style="dim", no_wrap=True, overflow="ellipsis")
        return Group(line, rest) if others else Group(line)


def table(title: str, rows: Sequence[Sequence[Cell]], columns: Sequence[str]) -> None:
    """Prints a table of results: colours on a terminal, plain text otherwise, never wrapped.

    Args:
      title: the line above the table.
      rows: one value per column. Columns with `%` in the header contain fractions; they are printed
        times 100 with one decimal, the largest emphasised on a terminal. None and NaN print as a
        dash.
      columns: the headers.
    """
    colours = sys.stdout.isatty()
    columns_of = [[row[i] for row in rows] for i in range(len(columns))]
    numeric = [any(isinstance(cell, int | float) for cell in column) for column in columns_of]
    shown = Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for header, right in zip(columns, numeric, strict=True):
        shown.add_column(header, justify="right" if right else "left", no_wrap=True)
    best = [
        _best(column) if "%" in header else None
        for header, column in zip(columns, columns_of, strict=True)
    ]
    for row in rows:
        cells = [
            Text(
                _cell(cell, "%" in header),
                style="bold green" if cell is not None and cell == top else "",
            )
            for header, cell, top in zip(columns, row, best, strict=True)
        ]
        shown.add_row(*cells)
    text = io.StringIO()
    # force_jupyter=False: in a notebook, rich would otherwise write HTML instead of text.
    Console(file=text, width=TABLE_WIDTH, force_terminal=colours, force_jupyter=False).print(shown)
    lines = text.getvalue().splitlines()
    print("\n".join(line.rstrip() for line in lines), flush=True)


def _best(column: Sequence[Cell]) -> int | float | None:
    numbers = [c for c in column if isinstance(c, int | float) and math.isfinite(c)]
    return max(numbers) if len(numbers) > 1 else None


def _cell(value: Cell, percent: bool) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return BLANK
    if isinstance(value, str):
        return value
    if percent:
        return f"{100 * value:.1f}"
    return f"{value:,}" if isinstance(value, int) else figure(value)
