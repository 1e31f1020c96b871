"""Two sets of finished runs, compared on the same queries."""

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

# What a run was measured on: images, and which of them are queries under which conditions.
MEASURED_ON = ("test_fingerprint", "held_back_corruptions", "corruption_seed")
CONDITIONS = ("clean", "trained", "held_back")
Key = tuple[str, str, str]  # variant, protocol, condition


@dataclass(frozen=True)
class Run:
    """What a comparison needs of a finished run.

    Attributes:
      data: `data` of its result.json.
      trained: corruptions it was trained with.
      columns: its per-query table.
    """

    path: Path
    data: dict
    trained: tuple[str, ...]
    columns: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Reads a run directory.

        Raises:
          UserError: no run, or one that is not finished.
        """
        home = Workdir(path)
        for part in (home.result, home.per_query):
            if not part.is_file():
                raise UserError(f"{path}: is no finished run ({part} is missing)")
        try:
            result = json.loads(home.result.read_text("utf-8"))
            table = pq.read_table(home.per_query)
            trained = tuple(result["config"]["data"]["corruptions"])
            measured = dict(result["data"])
        except KeyError as error:
            raise UserError(f"{home.result} is damaged: it lacks {error}") from None
        except (ValueError, OSError, TypeError) as error:
            raise UserError(f"{path}: is damaged ({error})") from None
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        return cls(path, measured, trained, columns)


def load(paths: Sequence[Path]) -> list[Run]:
    """Reads run directories, each of another run.

    Raises:
      UserError: as `Run.load`, or a run that is there twice, also as a copy: the figures of one run
        would count as those of several.
    """
    runs: list[Run] = []
    seen: dict[str, Path] = {}
    for path in paths:
        runs.append(Run.load(path))
        home = Workdir(path)
        same = joint_sha256(map(file_sha256, (home.result, home.per_query)))
        if same in seen:
            what = str(path) if path == seen[same] else f"{seen[same]} and {path}"
            raise UserError(f"{what}: the same run is given twice; give each run once")
        seen[same] = path
    return runs


@dataclass(frozen=True)
class Line:
    """One variant of the table under one protocol and condition.

    Attributes:
      first, second: means of both sides over queries and runs.
      classes: difference (first minus second) of the mean over runs, with the interval of a
        bootstrap over classes: would other objects say the same?
      p: of the sign-flip test over classes.
      seeds: difference with the interval over pairs of runs (would other seeds say the same?);
        None for a single pair.
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
    """Every variant, protocol and condition that both sides have.

    Args:
      first: runs of one side, such as three seeds.
      second: as many runs of the other side; they are paired in this order.
      metric: a figure of the per-query table.

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
    """What all runs have: variant, protocol and condition, names and classes of the queries, and a
    figure of each query in each run.

    Raises:
      UserError: runs on different images or queries, an unknown metric, or nothing in common.
    """
    for run in runs:
        for name in MEASURED_ON:
            if name not in run.data:
                raise UserError(f"{run.path}: is of an earlier version; start it again to evaluate")
            if run.data[name] != runs[0].data[name]:
                raise UserError(
                    f"{run.path} and {runs[0].path} were not measured on the same: {name}"
                    f" {run.data[name]!r}, not {runs[0].data[name]!r}"
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
            raise UserError(f"{' / '.join(key)}: the runs were not asked the same queries")
        if not all(one[key][3] == corrupted for one in tables):
            raise UserError(
                f"{' / '.join(key)}: the runs were not measured with the same corruptions and "
                "severities (evaluation.severities)"
            )
        found.append((key, queries, labels, np.stack([one[key][2] for one in tables])))
    return found


def _figures(
    run: Run, metric: str
) -> dict[Key, tuple[np.ndarray, Int64[np.ndarray, "q"], Float64[np.ndarray, "q"], set]]:
    """(variant, protocol, condition) -> queries, their classes, the figure of each (the mean over
    corruptions and severities), and the corruptions and severities."""
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
                queries, at, place, count = np.unique(
                    run.columns["query"][chosen].astype(str),
                    return_index=True, return_inverse=True, return_counts=True,
                )  # fmt: skip
                values = np.bincount(place, weights=run.columns[metric][chosen]) / count
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
    """Mean and interval of a figure of each run; None for a single one."""
    if len(values) < 2:
        return None
    mean, half = statistics.mean_and_interval(values)
    return Estimate(mean, mean - half, mean + half)
