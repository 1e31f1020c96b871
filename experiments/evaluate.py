"""Evaluates on a benchmark: `python -m experiments.evaluate`.

    python -m experiments.evaluate --run=runs/afa_resnet50 --benchmark=roxford5k --path=DATA

Embeds queries and gallery with the networks of the run, searches exactly, and prints the metrics of
the benchmark with a 95 % bootstrap interval over queries (over classes, if there are any).

  roxford5k, rparis6k  gnd_NAME.pkl and jpg/; easy, medium and hard
  gldv2                index.csv, retrieval_solution_v2.1.csv, index/ and test/; mAP@100
  gldv2_recognition    train_clean.csv (or train.csv), recognition_solution_v2.1.csv; GAP
  inshop               list_eval_partition.txt; Recall@K
  folder               query/CLASS/IMAGE and gallery/CLASS/IMAGE; Recall@K
  corrupted_queries    any data set; clean gallery, corrupted queries; R@1 and MAP@R

corrupted_queries describes the test classes of a data set (for choices, --split=validation), given
by --data.name, --data.path and the like or taken from the run, with one of:

  --run=RUN            the descriptor of a finished run; counted as a use of its test classes
  --vectors=FILE       vectors of any other software for the images that --write wrote (npz or
                       Parquet); --path=DIR is then the directory of --write
  --write=DIR          only writes the images and their list
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import UserError, choose
from experiments import corrupted
from experiments.cli import Parser, note, perform
from experiments.search import images

if TYPE_CHECKING:
    from afa.evaluation.benchmarks.contract import Figure

PROGRAM = "python -m experiments.evaluate"


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser.of(PROGRAM, __doc__)
    add = options.add_argument
    add("--run", default=None, type=Path, help="directory of a finished run")
    add("--benchmark", required=True, metavar="NAME", help="one of the above")
    add("--path", default=None, metavar="DIR", help="directory of its files")
    add("--distractors", default=None, metavar="DIR",
        help="folder of images that are added to the gallery and never correct")  # fmt: skip
    options.add_out()
    corrupted.add_options(options)
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    from afa.evaluation import benchmarks

    choose("--benchmark", chosen.benchmark, {**benchmarks.BENCHMARKS, corrupted.NAME: None})
    if chosen.benchmark == corrupted.NAME:
        if chosen.distractors is not None:
            raise UserError(f"--distractors: {corrupted.NAME} takes none")
        return corrupted.perform(chosen)
    corrupted.refuse_options(chosen)
    for name in ("run", "path"):
        if getattr(chosen, name) is None:
            raise UserError(f"--{name} is missing")
    return _public(chosen)


def _public(chosen: argparse.Namespace) -> int:
    from afa import parallel, runtime
    from afa.console import table
    from afa.data.sources.listed import directory
    from afa.evaluation import benchmarks
    from afa.inference.load import TrainedEmbedder
    from afa.io import write_json

    extra: list[Path] = []
    if chosen.distractors is not None:
        extra = images([str(directory("--distractors", chosen.distractors))])
    root = directory("--path", chosen.path)
    benchmark = benchmarks.load(chosen.benchmark, root, extra)
    runtime.keep_memory()
    embedder = TrainedEmbedder.load(chosen.run)
    note(benchmark.protocol)
    figures = benchmark.score(embedder(benchmark.queries), embedder(benchmark.gallery, "gallery"))
    columns = ["of", "figure", "percent", "95 percent interval", "queries"]
    table(f"{benchmark.name}, exact search", [_row(each) for each in figures], columns)
    if chosen.out:
        content = {
            "benchmark": benchmark.name,
            "protocol": benchmark.protocol,
            "run": str(chosen.run),
            "checkpoint": embedder.record["checkpoint"],
            "hardware": parallel.platform(),
            "figures": [dataclasses.asdict(each) for each in figures],
        }
        write_json(chosen.out, content)
    return 0


def _row(figure: "Figure") -> list[Any]:
    interval = "-"
    if figure.interval is not None:
        interval = f"[{100 * figure.interval.low:.1f}, {100 * figure.interval.high:.1f}]"
    part = figure.part or "all"
    return [part, figure.name, f"{100 * figure.value:.1f}", interval, figure.queries]


if __name__ == "__main__":
    sys.exit(main())
