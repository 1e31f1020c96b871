"""Tables over many runs: `python -m experiments.results RUN...`.

    python -m experiments.results runs/store/* --by loss.name --against "debug loss.name=arcface"

Groups the runs by experiment and by the fields of --by; the runs of a group differ in their seed.
Prints for every group the mean of a metric with its 95 % intervals over seeds (from three) and over
classes, and, against the group of reference, the paired difference: bootstrap over classes, and the
p-value of a sign-flip test, adjusted for all rows by Holm's method. From five seeds also the
interquartile mean and the probability of improvement. Costs: parameters, seconds of a training
step, size of the index.
"""

import argparse
import dataclasses
import html
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli import Parser, perform

if TYPE_CHECKING:
    from afa.runs.results import Group, Row

PROGRAM = "python -m experiments.results"
BLANK = ""

Cells = Sequence[Sequence[str]]  # rows of a table; the first row has the names of the columns


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(
        prog=PROGRAM,
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directories of finished runs")
    add("--by", default="", metavar="FIELD,FIELD", help="fields that distinguish groups")
    add("--against", default="", metavar="GROUP", help="the group of reference, by its name")
    add("--metric", default="map_at_r", help="metric of the per-query table (default: map_at_r)")
    add("--variant", default="fused", help="variant of the runs' tables (default: fused)")
    add("--protocol", default="leave_one_out", help="default: leave_one_out")
    add("--queries", default="clean", help="clean, trained or held_back (default: clean)")
    add("--format", default="markdown", help=f"{', '.join(FORMATS)} (default: markdown)")
    options.add_out()
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    from afa.errors import choose
    from afa.io import write_json
    from afa.runs import results

    write = choose("--format", chosen.format, FORMATS)
    by = [field for field in chosen.by.split(",") if field]
    groups = results.groups(chosen.runs, by)
    key = chosen.variant, chosen.protocol, chosen.queries
    rows = results.table(groups, chosen.against, key, chosen.metric)
    print(write(cells(groups, rows)))
    if chosen.out:
        content = {"metric": chosen.metric, "table": " / ".join(key), "rows": [
            dataclasses.asdict(row) | {"costs": dict(group.costs)}
            for group, row in zip(groups, rows, strict=True)]}  # fmt: skip
        write_json(chosen.out, content)
    return 0


def cells(groups: "Sequence[Group]", rows: "Sequence[Row]") -> Cells:
    """Returns the table as text; columns without any value are left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "group": lambda row: row.group,
        "seeds": lambda row: str(row.seeds),
        "mean, over seeds": lambda row: _with_half_width(row.mean, row.over_seeds),
        "over classes": lambda row: f"[{100 * row.classes.low:.1f}, {100 * row.classes.high:.1f}]",
        "IQM": lambda row: BLANK if row.iqm is None else f"{100 * row.iqm:.1f}",
        "difference, over seeds": _difference,
        "difference, over classes": _difference_over_classes,
        "p (Holm)": lambda row: BLANK if row.p is None else f"{row.p:.4f}",
        "P(improvement)": lambda r: BLANK if r.improvement is None else f"{r.improvement:.2f}",
    }
    body = [[cell(row) for cell in columns.values()] for row in rows]
    head = [*columns, *groups[0].costs]
    costs = [[f"{value:,.4g}" for value in group.costs.values()] for group in groups]
    full = [head, *([*row, *cost] for row, cost in zip(body, costs, strict=True))]
    kept = [i for i in range(len(head)) if any(row[i] != BLANK for row in full[1:])]
    return [[row[i] for i in kept] for row in full]


def _with_half_width(mean: float, half: float | None, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _difference(row: "Row") -> str:
    if row.difference is None:
        return BLANK
    return _with_half_width(row.difference.mean, row.seeds_of_difference, "+")


def _difference_over_classes(row: "Row") -> str:
    if row.difference is None:
        return BLANK
    return f"[{100 * row.difference.low:+.1f}, {100 * row.difference.high:+.1f}]"


def markdown(table: Cells) -> str:
    """Formats a table for Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def comma_separated(table: Cells) -> str:
    """Formats a table as CSV."""
    import csv
    import io

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue().rstrip("\n")


def latex(table: Cells) -> str:
    """Formats a table for LaTeX, with the package booktabs."""
    special = {each: f"\\{each}" for each in "&%$#_{}"} | {
        "±": "$\\pm$", "~": "\\textasciitilde{}", "\\": "\\textbackslash{}",
        "^": "\\textasciicircum{}",
    }  # fmt: skip
    lines = [" & ".join("".join(special.get(c, c) for c in cell) for cell in row) + r" \\"
             for row in table]  # fmt: skip
    layout = "l" + "r" * (len(table[0]) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
         r"\bottomrule", r"\end{tabular}"]
    )  # fmt: skip


def hypertext(table: Cells) -> str:
    """Formats a table for HTML."""

    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = [line(row, "td") for row in table[1:]]
    return "\n".join(["<table>", line(table[0], "th"), *body, "</table>"])


FORMATS: dict[str, Callable[[Cells], str]] = {
    "markdown": markdown, "csv": comma_separated, "latex": latex, "html": hypertext,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
