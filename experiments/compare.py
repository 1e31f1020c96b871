"""Two runs, or several seeds of two, on the same queries: `python -m experiments.compare`.

    python -m experiments.compare runs/afa_0 runs/afa_1 --against runs/base_0 runs/base_1

Prints every row, protocol and condition that both sides have: the means, their difference with the
95 % interval over classes (a bootstrap: would other objects say the same?), the p-value of a
sign-flip test over classes, and, with several pairs, the 95 % interval over seeds.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.run import guarded, quiet
from experiments.search import Parser

PROGRAM = "python -m experiments.compare"


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        prog=PROGRAM,
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directories of finished runs")
    add("--against", nargs="+", type=Path, required=True, metavar="RUN", help="as many others")
    add("--metric", default="map_at_r", help="figure of the per-query table (default: map_at_r)")
    add("--row", default=None, help="only this row of the table, such as fused")
    options.add_out()
    return options


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return guarded(lambda: _main(sys.argv[1:] if words is None else words))


def _main(words: Sequence[str]) -> int:
    chosen = parser().parse_args(list(words))
    quiet()
    from afa.errors import choose
    from afa.evaluation.comparison import Run, compare
    from afa.evaluation.statistics import Estimate
    from afa.report.progress import table
    from afa.report.writers import write_json

    sides = [[Run.load(path) for path in paths] for paths in (chosen.runs, chosen.against)]
    lines = compare(*sides, metric=chosen.metric)
    if chosen.row is not None:
        choose("--row", chosen.row, dict.fromkeys(line.row for line in lines))
        lines = [line for line in lines if line.row == chosen.row]

    def told(found: Estimate | None) -> str:
        if found is None:
            return "-"
        return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"

    columns = ["row", "protocol", "queries", "first", "second", "over classes", "p", "over seeds"]
    rows = [
        [line.row, line.protocol, line.condition, f"{100 * line.first:.1f}",
         f"{100 * line.second:.1f}", told(line.classes), f"{line.p:.4f}", told(line.seeds)]
        for line in lines
    ]  # fmt: skip
    table(f"{chosen.metric}, percent; difference of {len(chosen.runs)} runs", rows, columns)
    if chosen.out:
        figures = [dataclasses.asdict(line) for line in lines]
        write_json(chosen.out, {"metric": chosen.metric, "lines": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
