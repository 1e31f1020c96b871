"""Compares two sets of finished runs on the same queries."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64

from afa.errors import UserError, choose
from afa.evaluation import statistics
from afa.evaluation.statistics import Estimate
from afa.io import file_sha256, joint_sha256
from afa.workdir import Workdir

# Fields of result.json that must be equal: test images, queries and corruptions.
MEASURED_ON = ("test_fingerprint", "held_back_corruptions", "corruption_seed")
CONDITIONS = ("clean", "trained", "held_back")
Key = tuple[str, str, str]  # variant, protocol, condition


@dataclass(frozen=True)
class Run:
    """The results of a finished run that a comparison needs.

    Attributes:
      path: run directory.
      data: `data` of result.json.
      trained: trained corruptions.
      columns: per-query table, name -> column.
    """

    path: Path
    data: dict
    trained: tuple[str, ...]
    columns: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Reads a run directory.

        Raises:
          UserError: no run, a run that is not finished, or damaged files.
        """
        workdir = Workdir(path)
        for part in (workdir.result, workdir.per_query):
            if not part.is_file():
                raise UserError(f"{path}: is not a finished run ({part} is missing)")
        try:
            result = json.loads(workdir.result.read_text("utf-8"))
            table = pq.read_table(workdir.per_query)
            trained = tuple(result["config"]["data"]["corruptions"])
            measured = dict(result["data"])
        except KeyError as error:
            raise UserError(f"{workdir.result} is damaged: it lacks {error}") from None
        except (ValueError, OSError, TypeError) as error:
            raise UserError(f"{path}: is damaged ({error})") from None
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        return cls(path, measured, trained, columns)


def load(paths: Sequence[Path]) -> list[Run]:
    """Reads run directories.

    Raises:
      UserError: as `Run.load`, or a run is given twice, even as a copy: it would count as several
        runs.
    """
    runs: list[Run] = []
    seen: dict[str, Path] = {}
    for path in paths:
        runs.append(Run.load(path))
        workdir = Workdir(path)
        digest = joint_sha256(map(file_sha256, (workdir.result, workdir.per_query)))
        if digest in seen:
            names = str(path) if path == seen[digest] else f"{seen[digest]} and {path}"
            raise UserError(f"{names}: the same run is given twice; give each run once")
        seen[digest] = path
    return runs


@dataclass(frozen=True)
class Line:
    """Comparison of one variant under one protocol and condition.

    Attributes:
      variant, protocol, condition: names.
      first, second: mean of each side over queries and runs.
      classes: difference (first minus second) with the interval of a bootstrap over classes.
      p: p-value of the sign-flip test over classes.
      seeds: difference with the interval over pairs of runs; None for a single pair.
    """

    variant: str
    protocol: str
    condition: str
    first: float
    second: float
    classes: Estimate
    p: float
    seeds: Estimate | None


def compare(first: Sequence[Run], second: Sequence[Run], metric: str = "map_at_r") -> list[Line]:
    """Compares both sides for every variant, protocol and condition that they have in common.

    Args:
      first: runs of one side, such as three seeds.
      second: as many runs of the other side, paired in this order.
      metric: a metric of the per-query table.

    Raises:
      UserError: different numbers of runs, runs on different images or queries, an unknown
        metric, or nothing in common.
    """
    runs = [*first, *second]
    if len(first) != len(second):
        raise UserError(f"{len(first)} runs against {len(second)}: they are compared in pairs")
    return [
        _line(key, labels, values[: len(first)], values[len(first) :])
        for key, _, labels, values in common_figures(runs, metric)
    ]


def common_figures(
    runs: Sequence[Run], metric: str
) -> list[tuple[Key, np.ndarray, Int64[np.ndarray, "q"], Float64[np.ndarray, "runs q"]]]:
    """Collects a metric for every variant, protocol and condition that all runs have in common.

    Returns:
      (variant, protocol, condition), ids of the queries, their classes, and the metric of each
      query in each run.

    Raises:
      UserError: runs on different images or queries, an unknown metric, or nothing in common.
    """
    for run in runs:
        for name in MEASURED_ON:
            if name not in run.data:
                raise UserError(
                    f"{run.path}: was written by an earlier version; start it again to evaluate"
                )
            if run.data[name] != runs[0].data[name]:
                raise UserError(
                    f"{run.path} and {runs[0].path} cannot be compared: they differ in {name},"
                    f" {run.data[name]!r} and {runs[0].data[name]!r}"
                )
    names = {n: None for n, column in runs[0].columns.items() if column.dtype == np.float64}
    choose("--metric", metric, names)
    tables = [_figures(run, metric) for run in runs]
    common = [key for key in tables[0] if all(key in one for one in tables)]
    if not common:
        raise UserError("the runs have no variant, protocol and condition in common")
    found = []
    for key in common:
        queries, labels, _, corrupted = tables[0][key]
        if not all(np.array_equal(one[key][0], queries) for one in tables):
            raise UserError(f"{' / '.join(key)}: the runs have different queries")
        if not all(one[key][3] == corrupted for one in tables):
            raise UserError(
                f"{' / '.join(key)}: the runs have different corruptions or severities "
                "(evaluation.severities)"
            )
        found.append((key, queries, labels, np.stack([one[key][2] for one in tables])))
    return found


def _figures(
    run: Run, metric: str
) -> dict[Key, tuple[np.ndarray, Int64[np.ndarray, "q"], Float64[np.ndarray, "q"], set]]:
    """(variant, protocol, condition) -> queries, their classes, the metric of each query (mean over
    corruptions and severities), and the set of corruptions and severities."""
    condition = np.where(
        run.columns["corruption"] == "",
        CONDITIONS[0],
        np.where(np.isin(run.columns["corruption"], run.trained), CONDITIONS[1], CONDITIONS[2]),
    )
    found = {}
    variants, protocols = run.columns["variant"], run.columns["protocol"]
    for variant in dict.fromkeys(variants):
        for protocol in dict.fromkeys(protocols):
            for name in CONDITIONS:
                chosen = (variants == variant) & (protocols == protocol) & (condition == name)
                if not chosen.any():
                    continue
                queries, at, inverse, count = np.unique(
                    run.columns["query"][chosen].astype(str),
                    return_index=True, return_inverse=True, return_counts=True,
                )  # fmt: skip
                values = np.bincount(inverse, weights=run.columns[metric][chosen]) / count
                labels = run.columns["label"][chosen][at]
                kinds = (run.columns[each][chosen].tolist() for each in ("corruption", "severity"))
                corrupted = set(zip(*kinds, strict=True))
                found[str(variant), str(protocol), name] = queries, labels, values, corrupted
    return found


def _line(
    key: Key,
    labels: Int64[np.ndarray, "q"],
    first: Float64[np.ndarray, "runs q"],
    second: Float64[np.ndarray, "runs q"],
) -> Line:
    one, other = first.mean(axis=0), second.mean(axis=0)
    return Line(
        *key,
        first=float(np.nanmean(one)),
        second=float(np.nanmean(other)),
        classes=statistics.bootstrap(one - other, labels),
        p=statistics.sign_flip(one, other, labels),
        seeds=over_runs(np.nanmean(first, axis=1) - np.nanmean(second, axis=1)),
    )


def over_runs(values: Float64[np.ndarray, "runs"]) -> Estimate | None:
    """Mean and interval over one value per run; None for a single run."""
    if len(values) < 2:
        return None
    mean, half = statistics.mean_and_interval(values)
    return Estimate(mean, mean - half, mean + half)
