"""The benchmark `corrupted_queries` of `experiments.evaluate`: options, parts in order, output."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.config import DataConfig, ExperimentConfig
from afa.errors import UserError, choose
from experiments import cli
from experiments.cli import Parser, note

if TYPE_CHECKING:
    from afa.evaluation.benchmarks.contract import Figure
    from afa.evaluation.benchmarks.corrupted import Definition, Describe, Line, Row
    from afa.inference.load import TrainedEmbedder

NAME = "corrupted_queries"
# Options of this benchmark alone; those of DEFINES are stored in the directory of --write.
DEFINES = ("split", "queries", "severities", "groups", "protocol")
OWN = (*DEFINES, "vectors", "write", "format")
# Fields of the data set that its test or validation classes or their images depend on.
DATA = ("name", "path", "cache", "image_size", "objects", "views", "render_size", "corruptions",
        "validation_fraction", "folds", "fold", "split_seed", "max_unreadable",
        "read_threads")  # fmt: skip
TRAINED = "corruptions that the descriptor was trained on (default: those of afa)"
TEXT = "text"


@dataclass(frozen=True)
class Source:
    """The data set of the benchmark."""

    data: DataConfig = field(default_factory=DataConfig)


def add_options(options: Parser) -> None:
    """Adds the options of the benchmark."""
    own = options.add_argument_group(NAME)
    add = own.add_argument
    add("--split", default=None,
        help="classes: test, or for choices validation (default: test)")  # fmt: skip
    add("--queries", type=int, default=None, metavar="N",
        help="number of queries, drawn evenly over the classes (default: all)")  # fmt: skip
    add("--severities", type=int, nargs="+", default=None, metavar="N", help="default: 3 5")
    add("--groups", nargs="+", default=None, metavar="NAME",
        help="groups of corruptions (default: trained held_back unseen; on validation classes "
             "trained, and left_out, which are usual in training and were not used)")  # fmt: skip
    add("--protocol", default=None,
        help="default: the main one of the data set, and catalogue where there is one")  # fmt: skip
    add("--vectors", type=Path, default=None, metavar="FILE",
        help=".npz with ids and vectors, or .parquet with id and embedding")  # fmt: skip
    add("--write", type=Path, default=None, metavar="DIR",
        help="write images and manifest.csv to a new directory")  # fmt: skip
    add("--format", default=None,
        help="text, markdown, csv, latex or html (default: text)")  # fmt: skip
    about = "settings of the data set, as in experiments.run"
    for name in DATA:
        text = {"name": f"{about} (--data.FIELD: {', '.join(DATA)})", "corruptions": TRAINED}
        add(f"--data.{name}", nargs="+", default=None, metavar="VALUE",
            help=text.get(name, argparse.SUPPRESS))  # fmt: skip


def refuse_options(chosen: argparse.Namespace) -> None:
    """Checks that no option of this benchmark is given with another one.

    Raises:
      UserError: names the option.
    """
    for name in (*OWN, *(f"data.{each}" for each in DATA)):
        if getattr(chosen, name) is not None:
            raise UserError(f"--{name} is an option of --benchmark={NAME} only")


def perform(chosen: argparse.Namespace) -> int:
    """Writes the images, or scores a descriptor; returns the exit code."""
    from afa.runs.result_files import FORMATS

    choose("--format", chosen.format or TEXT, {TEXT: None, **FORMATS})
    _check(chosen)
    if chosen.vectors is not None:
        return _score_vectors(chosen)
    return _write(chosen) if chosen.write is not None else _score_run(chosen)


def _check(chosen: argparse.Namespace) -> None:
    """Checks which options are given together.

    Raises:
      UserError: options that exclude each other, or nothing to do.
    """
    given = {name for name in (*OWN, "run", "path", "out") if getattr(chosen, name) is not None}
    data = [f"data.{name}" for name in DATA if getattr(chosen, f"data.{name}") is not None]
    if not given & {"run", "vectors", "write"}:
        raise UserError(f"--benchmark={NAME} needs --run, --vectors or --write")
    for pair in (("vectors", "run"), ("vectors", "write"), ("write", "out"), ("write", "format")):
        if given >= set(pair):
            raise UserError(f"--{pair[0]} and --{pair[1]} exclude each other")
    if "path" in given and "vectors" not in given:
        raise UserError(f"--path: {NAME} reads the data set of --data.path; a directory of --write "
                        "is for --vectors")  # fmt: skip
    if "path" in given and (wrong := [*data, *(name for name in DEFINES if name in given)]):
        raise UserError(f"--{wrong[0]}: {chosen.path} holds this setting already; leave it out")
    if not given & {"run", "path"} and "data.name" not in data:
        raise UserError(f"--benchmark={NAME} needs --run or --data.name")
    if "run" in given and "data.corruptions" in data:
        raise UserError("--data.corruptions: the run was trained on its own; leave it out")


# ---- what the command does ---------------------------------------------------------------------


def _write(chosen: argparse.Namespace) -> int:
    from afa.evaluation.benchmarks import files
    from afa.workdir import Workdir

    data = DataConfig()
    if chosen.run is not None:
        stored = Workdir(chosen.run).stored()
        if stored is None:
            raise UserError(f"--run={chosen.run}: contains no run (config.json is missing)")
        data = stored[1].data
    data = _data(chosen, data)
    benchmark = _benchmark(chosen, data)
    files.write(chosen.write, benchmark, data.read_threads)
    note(f"{chosen.write}: {len(benchmark.rows):,} images, listed in {files.MANIFEST}")
    return 0


def _score_run(chosen: argparse.Namespace) -> int:
    from afa import runtime
    from afa.evaluation.benchmarks.corrupted import CATALOGUE, GALLERY
    from afa.inference.load import TrainedEmbedder
    from afa.workdir import Workdir

    runtime.keep_memory()
    embedder = TrainedEmbedder.load(chosen.run)
    benchmark = _benchmark(chosen, _data(chosen, embedder.config.data))
    dimension = 0

    def describe(index: Any) -> Any:
        nonlocal dimension
        searched = benchmark.rows[index[0]].role in (GALLERY, CATALOGUE)
        vectors = embedder(benchmark.image_set(index), "gallery" if searched else "query")
        dimension = vectors.shape[1]
        return vectors

    lines = _scored(benchmark.definition, benchmark.rows, describe)
    if benchmark.definition.split == "test":
        Workdir(chosen.run).count_test_read(NAME)
    cost = {"dimension": dimension, **_search_cost(embedder)}
    descriptor = {"run": str(chosen.run), "checkpoint": embedder.record["checkpoint"]}
    _show(chosen, benchmark.definition, lines, descriptor, cost)
    return 0


def _score_vectors(chosen: argparse.Namespace) -> int:
    from afa.data.sources.listed import directory
    from afa.evaluation.benchmarks import files
    from afa.io import file_sha256

    if not chosen.vectors.is_file():
        raise UserError(f"--vectors={chosen.vectors}: there is no such file")
    if chosen.path is not None:
        definition, rows = files.read(directory("--path", chosen.path))
    else:
        benchmark = _benchmark(chosen, _data(chosen, DataConfig()))
        definition, rows = benchmark.definition, benchmark.rows
    vectors = files.read_vectors(chosen.vectors, rows)
    lines = _scored(definition, rows, lambda index: vectors[index])
    descriptor = {"vectors": str(chosen.vectors), "sha256": file_sha256(chosen.vectors)}
    cost = {"dimension": vectors.shape[1], "fusion": None, "relative_operations": None}
    _show(chosen, definition, lines, descriptor, cost)
    return 0


def _scored(definition: "Definition", rows: "Sequence[Row]", describe: "Describe") -> "list[Line]":
    from afa.evaluation.benchmarks import corrupted

    return corrupted.score(definition, rows, describe, note)


# ---- the data set ------------------------------------------------------------------------------


def _data(chosen: argparse.Namespace, default: DataConfig) -> DataConfig:
    """Returns the settings of the data set with the given fields changed.

    Raises:
      UserError: an invalid value.
    """
    from afa.checks import validate_fields

    words: list[str] = []
    for name in DATA:
        if (values := getattr(chosen, f"data.{name}")) is not None:
            words += [f"--data.{name}", *values] if len(values) > 1 else [
                f"--data.{name}={values[0]}"
            ]  # fmt: skip
    data = cli.fields(words, Source(default), "experiments.evaluate", None, ()).data
    validate_fields(ExperimentConfig(data=data))
    return data


def _benchmark(chosen: argparse.Namespace, data: DataConfig) -> Any:
    from afa.data.sources import registry
    from afa.evaluation.benchmarks import corrupted

    split = chosen.split or "test"
    groups = corrupted.grouped(chosen.groups, data.corruptions, split)
    severities = chosen.severities
    if severities is None:
        severities = corrupted.USUAL_SEVERITIES
    severities = corrupted.check_severities(severities)
    dataset = registry.load(data)
    return corrupted.define(
        dataset, data, groups, severities, chosen.queries or 0, chosen.protocol or "auto", split
    )


# ---- the output --------------------------------------------------------------------------------


def _search_cost(embedder: "TrainedEmbedder") -> dict[str, Any]:
    """Returns how the descriptor is fused, and the operations of a query relative to one pass of
    F, as the run counted them."""
    result = json.loads(embedder.workdir.result.read_text("utf-8"))
    fused = result["metrics"]["test"]["fused"]
    return {"fusion": embedder.fusion.text(), "relative_operations": fused["cost"]}


def _show(
    chosen: argparse.Namespace,
    definition: "Definition",
    lines: "Sequence[Line]",
    descriptor: Mapping[str, Any],
    cost: Mapping[str, Any],
) -> None:
    """Prints the tables, and writes the results as JSON."""
    from afa import parallel
    from afa.console import table
    from afa.io import write_json
    from afa.runs.result_files import FORMATS

    style = chosen.format or TEXT
    summaries_first = sorted(filter(_printed, lines), key=lambda line: bool(line.severity))
    for protocol in definition.protocols.values():
        rows = [_row(line) for line in summaries_first if line.protocol == protocol]
        if style == TEXT:
            title = (f"{definition.data}, {NAME}, {definition.split} classes, {protocol}, "
                     f"{definition.queries:,} queries")  # fmt: skip
            table(title, rows, COLUMNS)
        else:
            texts = [[_text(cell) for cell in row] for row in rows]
            print(FORMATS[style]([[f"queries ({protocol})", *COLUMNS[1:]], *texts]), end="\n\n")
    known = {name: value for name, value in cost.items() if value is not None}
    note("search cost: " + ", ".join(f"{n.replace('_', ' ')} {_spelled(v)}"
                                     for n, v in known.items()))  # fmt: skip
    if chosen.out:
        write_json(chosen.out, {
            "benchmark": NAME, "definition": definition, "descriptor": descriptor, "cost": cost,
            "hardware": parallel.platform(), "lines": [_record(line) for line in lines],
        })  # fmt: skip


COLUMNS = ("queries", "severity", "R@1 %", "interval of R@1", "MAP@R %", "interval of MAP@R")


def _printed(line: "Line") -> bool:
    """Means over the severities of one corruption are printed only if it is reported apart."""
    from afa.evaluation.benchmarks.corrupted import APART, EVERY

    return line.severity is not None or line.part not in EVERY or line.part in APART


def _row(line: "Line") -> list[Any]:
    severity = {None: "mean", 0: ""}.get(line.severity, str(line.severity))
    cells = [cell for each in line.figures.values() for cell in (each.value, _interval(each))]
    return [line.part, severity, *cells]


def _interval(figure: "Figure") -> str:
    if figure.interval is None:
        return "-"
    return f"[{100 * figure.interval.low:.1f}, {100 * figure.interval.high:.1f}]"


def _text(cell: str | float) -> str:
    return cell if isinstance(cell, str) else f"{100 * cell:.1f}"


def _spelled(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _record(line: "Line") -> dict[str, Any]:
    figures = {
        name: {"value": each.value, "interval": each.interval and dataclasses.asdict(each.interval)}
        for name, each in line.figures.items()
    }
    queries = next(iter(line.figures.values())).queries
    return {"protocol": line.protocol, "group": line.group, "part": line.part,
            "severity": line.severity, "queries": queries, **figures}  # fmt: skip
