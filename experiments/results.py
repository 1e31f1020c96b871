"""Tables over many runs: `python -m experiments.results RUN...`.

    python -m experiments.results runs/store/* --by loss.name --against "debug loss.name=arcface"

Groups the runs by experiment and by the fields of --by; the runs of a group differ in their seed.

--table=groups (default): for every group the mean of a metric with its 95 % intervals over seeds
(from three) and over classes, and, against the group of reference, the paired difference: over
seeds, bootstrap over classes, and the p-value of a sign-flip test, adjusted for all rows by Holm's
method. From five seeds also the interquartile mean and the probability of improvement. Costs:
parameters, seconds of a training step, passes through F per query, size of the index.
--table=conditions: for every group R@1 and MAP@R under clean, trained and held-back corruptions,
the paired differences to the group of reference, search cost, and seconds of all training steps.
--table=variants: R@1 and MAP@R of all variants of one group under clean, trained and held-back
corruptions. --table=restoration: PSNR before and after G.

--out stores the figures as a result file. RUN may be such a file (.json), to print its table, or a
Markdown page, whose tables below `<!-- table: FILE -->` are written anew.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from afa.errors import UserError, choose
from experiments.cli import Parser, new_file, note, perform

if TYPE_CHECKING:
    from afa.runs.result_files import Table
    from afa.runs.results import Group

PROGRAM = "python -m experiments.results"
TABLES = ("groups", "conditions", "variants", "restoration")
PAIR = ("recall_at_1", "map_at_r")


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser.of(PROGRAM, __doc__)
    add = options.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN",
        help="directories of finished runs, result files, or Markdown pages")  # fmt: skip
    add("--table", default="groups", help=f"{', '.join(TABLES)} (default: groups)")
    add("--by", default="", metavar="FIELD,FIELD", help="fields that distinguish groups")
    add("--against", default="", metavar="GROUP", help="the group of reference, by its name")
    add("--metric", default="map_at_r", help="metric of the per-query table (default: map_at_r)")
    add("--variant", action="append", default=[], metavar="NAME",
        help="variant of the runs' tables (default: fused); --table=variants: may be repeated "
        "(default: all)")  # fmt: skip
    add("--protocol", default="leave_one_out", help="default: leave_one_out")
    add("--queries", default="clean", help="clean, trained or held_back (default: clean)")
    add("--format", default="markdown", help="markdown, csv, latex, html (default: markdown)")
    add("--plot", type=new_file, default=None, metavar="FILE",
        help="draw means and intervals of the groups (SVG)")  # fmt: skip
    add("--hardware", default="", help="description of the machine, for --out")
    options.add_out()
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    from afa.io import write_bytes
    from afa.runs import result_files

    write = choose("--format", chosen.format, result_files.FORMATS)
    choose("--table", chosen.table, dict.fromkeys(TABLES))
    if all(path.suffix in (".json", ".md") for path in chosen.runs):
        for path in chosen.runs:
            if path.suffix == ".md":
                write_bytes(path, result_files.updated(path).encode())
            else:
                print(write(result_files.load(path).texts()))
        return 0
    table, groups = _measured(chosen)
    print(write(table.texts()))
    for group in groups:
        note(f"test classes were evaluated {group.reads} times for {group.name} "
             f"({len(group.runs)} runs)")  # fmt: skip
    if chosen.out:
        hardware = chosen.hardware or table.hardware
        result_files.save(chosen.out, dataclasses.replace(table, hardware=hardware))
    return 0


def _measured(chosen: argparse.Namespace) -> "tuple[Table, list[Group]]":
    """Returns the table of the given runs, and its groups; draws it if asked."""
    from afa.io import write_bytes
    from afa.report.charts import interval_chart
    from afa.runs import results

    groups = results.groups(chosen.runs, [field for field in chosen.by.split(",") if field])
    variant = chosen.variant[0] if chosen.variant else "fused"
    if chosen.table == "conditions":
        if chosen.plot:
            raise UserError("--plot needs --table=groups")
        against, protocol = chosen.against, chosen.protocol
        return results.by_condition(groups, against, variant, protocol, PAIR), groups
    if chosen.table != "groups":
        if len(groups) > 1:
            names = ", ".join(group.name for group in groups)
            raise UserError(f"--table={chosen.table} is of one group, not of {names}")
        if chosen.plot or chosen.against:
            raise UserError(f"--table={chosen.table} has no --plot and no --against")
        if chosen.table == "restoration":
            return results.restoration(groups[0]), groups
        return results.by_variant(groups[0], chosen.protocol, PAIR, chosen.variant), groups
    key = variant, chosen.protocol, chosen.queries
    rows = results.compared(groups, chosen.against, key, chosen.metric)
    if chosen.plot:
        drawn = [(row.group, row.classes.mean, row.classes.low, row.classes.high) for row in rows]
        write_bytes(chosen.plot, interval_chart(drawn, f"{chosen.metric}, %").encode())
    return results.by_group(groups, rows, variant), groups


if __name__ == "__main__":
    sys.exit(main())
