"""Prints the tables of a finished run."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from afa.console import table
from afa.evaluation.evaluator import SHORT, Results
from afa.evaluation.metrics import extra
from afa.workdir import Workdir

FIGURES = {
    "recall_at_1": "R@1",
    "recall_at_2": "R@2",
    "recall_at_4": "R@4",
    "recall_at_8": "R@8",
    "map_at_r": "MAP@R",
    "r_precision": "R-prec",
    "mean_average_precision": "mAP",
}
GROUPS = {"trained": "trained", "held_back": "held-back"}


def show(
    results: Results, result: Mapping[str, Any], workdir: Workdir, print_line: Callable[[str], None]
) -> None:
    """Prints the result tables and the paths of the written files.

    Args:
      results: results of the evaluation.
      result: content of `result.json`.
      workdir: of the run.
      print_line: receives the lines below the tables.
    """
    variants = results.variants
    protocols = [name for name in next(iter(variants.values())) if name not in ("cost", "fusion")]
    columns = ["method", "cost", *(f"{each} %" for each in FIGURES.values())]
    columns += [f"{g} {FIGURES[m]} %" for g in GROUPS.values() for m in SHORT]
    for protocol in protocols:
        lines = []
        for name, variant in variants.items():
            found = variant[protocol]
            lines.append(
                [name, None if variant["cost"] is None else f"{variant['cost']:.2f}"]
                + [found["clean"][each] for each in FIGURES]
                + [found[g].get(m) for g in GROUPS for m in SHORT]
            )
        table(f"test classes, {protocol.replace('_', '-')}, exact search", lines, columns)
        if line := extra.summary(variants["fused"][protocol]["extra"]):
            print_line(f"fused     {line}")
    search, k = result["metrics"]["search"], result["config"]["retrieval"]["results"]
    print_line(
        f"search    {search['engine']}: recall@{k} {100 * search[f'recall_at_{k}']:.1f} % of exact "
        f"search, {search['queries_per_second']:,.0f} queries/s batched, "
        f"{search['single_queries_per_second']:,.0f} single"
    )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["timings"].items())
    print_line(f"timings   {seconds}")
    print_line(f"report    {workdir.report}")
    print_line(f"try       {search_command(workdir.root)}")


def search_command(run: Path) -> str:
    """Returns a shell command that searches with a run; its directory is quoted if needed."""
    words = ["python", "-m", "experiments.search", f"--run={run}", "YOUR_IMAGE.jpg"]
    return shlex.join(words)
