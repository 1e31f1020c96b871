"""Compares runs on the same queries: `python -m experiments.compare`.

    python -m experiments.compare runs/afa_0 runs/afa_1 --against runs/base_0 runs/base_1

Prints for every variant, protocol and condition that both sides have: the means, their difference
with a 95 % bootstrap interval over classes (how it would vary with other objects), the p-value of a
sign-flip test over classes, and, with several pairs, the 95 % interval over seeds.

    python -m experiments.compare runs/fold_0 runs/fold_1 runs/fold_2 --together

Without --against: the mean of runs of one kind (seeds, or the folds of a cross-validation) with
both intervals; --together adds the results of their concatenated fused descriptors.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.cli import Parser, perform

if TYPE_CHECKING:
    from afa.evaluation.statistics import Estimate

PROGRAM = "python -m experiments.compare"


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser.of(PROGRAM, __doc__)
    add = options.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directories of finished runs")
    add("--against", nargs="+", type=Path, default=(), metavar="RUN",
        help="the runs to compare with, in the same number")  # fmt: skip
    add("--together", action="store_true",
        help="without --against: also concatenate the descriptors of the runs")  # fmt: skip
    add("--metric", default="map_at_r", help="metric of the per-query table (default: map_at_r)")
    add("--variant", default=None, help="only this variant of the table, such as fused")
    options.add_out()
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    from afa.console import table
    from afa.errors import UserError, choose
    from afa.io import write_json
    from afa.runs import compare as comparison
    from afa.runs import summarise as summary

    loaded = comparison.load([*chosen.runs, *chosen.against])
    runs, others = loaded[: len(chosen.runs)], loaded[len(chosen.runs) :]
    if others and chosen.together:
        raise UserError("--together and --against exclude each other")
    lines: list[Any]
    if others:
        lines = comparison.compare(runs, others, metric=chosen.metric)
    else:
        lines = summary.summarise(runs, metric=chosen.metric)
        lines += summary.together(runs, metric=chosen.metric) if chosen.together else []
    if chosen.variant is not None:
        choose("--variant", chosen.variant, dict.fromkeys(line.variant for line in lines))
        lines = [
            line
            for line in lines
            if line.variant in (chosen.variant, f"{chosen.variant}, together")
        ]
    if others:
        columns = ["first", "second", "over classes", "p", "over seeds"]
        rows = [
            [_percent(line.first), _percent(line.second), _interval(line.classes, "+"),
             f"{line.p:.4f}", _interval(line.seeds, "+")]
            for line in lines
        ]  # fmt: skip
        title = f"{chosen.metric}, percent; difference of {len(runs)} runs"
    else:
        columns = ["mean", "over classes", "over runs", "each run"]
        rows = [
            [_percent(line.mean), _interval(line.classes), _interval(line.runs),
             " ".join(map(_percent, line.each))]
            for line in lines
        ]  # fmt: skip
        title = f"{chosen.metric}, percent; {len(runs)} runs"
    names = [[line.variant, line.protocol, line.condition] for line in lines]
    rows = [[*name, *figures] for name, figures in zip(names, rows, strict=True)]
    table(title, rows, ["variant", "protocol", "queries", *columns])
    if chosen.out:
        figures = [dataclasses.asdict(line) for line in lines]
        write_json(chosen.out, {"metric": chosen.metric, "lines": figures})
    return 0


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(estimate: "Estimate | None", sign: str = "") -> str:
    if estimate is None:
        return "-"
    mean, low, high = (f"{100 * v:{sign}.1f}" for v in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    sys.exit(main())
