"""Tables over many runs: groups of seeds, intervals, paired differences, and costs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float64

from afa import config as configuration
from afa.config import ExperimentConfig
from afa.errors import UserError, choose
from afa.evaluation import statistics
from afa.evaluation.statistics import Estimate
from afa.runs.compare import CONDITIONS, Run, common_figures, load
from afa.runs.result_files import Column, Table
from afa.runs.start import configured
from afa.workdir import Workdir

LEAST_FOR_IQM = 5
SEED = "seed"
PERCENT = 100.0
HEADS = {"clean": "clean queries", "trained": "trained corruptions",
         "held_back": "held-back corruptions"}  # fmt: skip
COSTS = (
    Column("parameters", digits=0), Column("s per step", digits=3), Column("search cost"),
    Column("index MiB"),
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
      name: experiment, and the values of the fields that the runs are grouped by.
      seeds: in ascending order.
      runs: of the seeds.
      results: content of their result.json.
    """

    name: str
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    results: tuple[Mapping[str, Any], ...]

    @property
    def reads(self) -> int:
        """How often its runs were evaluated on their test classes."""
        return sum(Workdir(run.path).test_reads() for run in self.runs)


@dataclass(frozen=True)
class Row:
    """One group in a table of one variant, protocol and condition.

    Attributes:
      group: name.
      each: mean of the metric over the queries, for every seed.
      classes: the mean with the interval of a bootstrap over classes.
      iqm: interquartile mean over seeds; None for fewer than five.
      differences: to the group of reference, for every common seed; () without a reference.
      difference: their mean with the interval of a bootstrap over classes.
      p: p-value of its sign-flip test over classes, adjusted for all rows of the table (Holm).
      improvement: probability that a run is better than one of the reference; None for fewer than
        five seeds.
    """

    group: str
    each: tuple[float, ...]
    classes: Estimate
    iqm: float | None
    differences: tuple[float, ...] = ()
    difference: Estimate | None = None
    p: float | None = None
    improvement: float | None = None


def groups(paths: Sequence[Path], by: Sequence[str]) -> list[Group]:
    """Reads runs and groups them by experiment and by the values of fields.

    Raises:
      UserError: a directory without a finished run, an unknown field, or runs of a group that
        differ in more than their seed.
    """
    found: dict[str, dict[int, tuple[Run, dict[str, Any]]]] = {}
    for run in load(paths):
        stored = Workdir(run.path).stored()
        if stored is None:
            raise UserError(f"{run.path}: is not a run (config.json is missing)")
        experiment, config = stored
        settings = configuration.flatten(config)
        for field in by:
            choose("--by", field, settings)
        name = " ".join([experiment, *(f"{field}={settings[field]}" for field in by)])
        members = found.setdefault(name, {})
        seed = settings.pop(SEED)
        if seed in members:
            other = members[seed][0].path
            raise UserError(f"{other} and {run.path}: both are {name} with seed {seed}")
        for other, known in members.values():
            if different := [field for field in settings if known.get(field) != settings[field]]:
                raise UserError(
                    f"{other.path} and {run.path}: both are {name}, but differ in "
                    f"{', '.join(different)}; name the field with --by"
                )
        members[seed] = run, settings
    return [_group(name, members) for name, members in found.items()]


def _group(name: str, members: Mapping[int, tuple[Run, dict[str, Any]]]) -> Group:
    seeds = tuple(sorted(members))
    runs = tuple(members[seed][0] for seed in seeds)
    found = tuple(json.loads(Workdir(run.path).result.read_text("utf-8")) for run in runs)
    return Group(name, seeds, runs, found)


def costs(group: Group, variant: str) -> list[float]:
    """Returns the cells of `COSTS`, means over the runs: parameters, seconds of a training step,
    passes through F per query, and size of the index."""
    each = []
    for run, result in zip(group.runs, group.results, strict=True):
        files = Workdir(run.path).embeddings.rglob("*")
        each.append([
            sum(result["parameters"].values()),
            result["timings"]["training_steps"] / max(result["step"], 1),
            result["metrics"]["test"][variant]["cost"] or 0.0,
            sum(file.stat().st_size for file in files if file.is_file()) / 2**20,
        ])  # fmt: skip
    return np.mean(np.asarray(each, np.float64), axis=0).tolist()


def compared(
    chosen: Sequence[Group], against: str, key: tuple[str, str, str], metric: str
) -> list[Row]:
    """Returns one row per group.

    Args:
      chosen: groups of `groups`.
      against: name of the group of reference; empty: no differences.
      key: variant, protocol and condition.
      metric: a metric of the per-query table.

    Raises:
      UserError: an unknown reference, no seed in common with it, or nothing measured for `key`.
    """
    if against:
        choose("--against", against, {group.name: None for group in chosen})
    values, labels = _values(chosen, key, metric)
    reference = next((group for group in chosen if group.name == against), None)
    rows = []
    for group in chosen:
        own = values[group.name]
        each = np.nanmean(own, axis=1)
        row = Row(
            group.name,
            tuple(each.tolist()),
            statistics.bootstrap(own.mean(axis=0), labels),
            statistics.interquartile_mean(each) if len(each) >= LEAST_FOR_IQM else None,
        )
        if reference is not None and group is not reference:
            row = _against(row, group, reference, values, labels)
        rows.append(row)
    tested = [i for i, row in enumerate(rows) if row.p is not None]
    adjusted = statistics.holm([rows[i].p or 0.0 for i in tested])
    for i, p in zip(tested, adjusted, strict=True):
        rows[i] = replace(rows[i], p=float(p))
    return rows


def _values(
    chosen: Sequence[Group], key: tuple[str, str, str], metric: str
) -> tuple[dict[str, Float64[np.ndarray, "seeds q"]], np.ndarray]:
    """The metric of every query in every run of each group, and the classes of the queries."""
    every = [run for group in chosen for run in group.runs]
    figures = common_figures(every, metric)
    keys = {" / ".join(each[0]): each for each in figures}
    _, _, labels, values = keys[choose_key(key, keys)]
    ends = np.cumsum([len(group.runs) for group in chosen])
    parts = np.split(values, ends[:-1])
    return {group.name: part for group, part in zip(chosen, parts, strict=True)}, labels


def choose_key(key: tuple[str, str, str], known: Mapping[str, Any]) -> str:
    """Returns the name of a variant, protocol and condition that all runs have.

    Raises:
      UserError: they do not have it.
    """
    name = " / ".join(key)
    choose("--variant, --protocol and --queries", name, known)
    return name


def _against(
    row: Row,
    group: Group,
    reference: Group,
    values: Mapping[str, Float64[np.ndarray, "seeds q"]],
    labels: np.ndarray,
) -> Row:
    at, other_at = _paired(group, reference)
    one, other = values[group.name][at], values[reference.name][other_at]
    each, others = np.nanmean(one, axis=1), np.nanmean(other, axis=1)
    enough = len(at) >= LEAST_FOR_IQM
    return replace(
        row,
        differences=tuple((each - others).tolist()),
        difference=statistics.bootstrap((one - other).mean(axis=0), labels),
        p=statistics.sign_flip(one.mean(axis=0), other.mean(axis=0), labels),
        improvement=statistics.probability_of_improvement(each, others) if enough else None,
    )


def _paired(group: Group, reference: Group) -> tuple[list[int], list[int]]:
    """Positions of the seeds in common, in both groups.

    Raises:
      UserError: there are none.
    """
    shared = [seed for seed in group.seeds if seed in reference.seeds]
    if not shared:
        raise UserError(f"{group.name} and {reference.name} have no seed in common")
    return [group.seeds.index(s) for s in shared], [reference.seeds.index(s) for s in shared]


# ---- tables ------------------------------------------------------------------------------------


def by_group(chosen: Sequence[Group], rows: Sequence[Row], variant: str) -> Table:
    """Returns the table of `compared`: one row per group."""
    columns = [
        Column("group"), Column("seeds", digits=0), Column("mean, over seeds", scale=PERCENT),
        Column("over classes", scale=PERCENT), Column("IQM", scale=PERCENT),
        Column("difference, over seeds", sign=True, scale=PERCENT),
        Column("over classes", sign=True, scale=PERCENT), Column("p (Holm)", digits=4),
        Column("P(improvement)", digits=2), *COSTS,
    ]  # fmt: skip
    cells = [
        [row.group, len(row.each), {"values": row.each}, _cell(row.classes), row.iqm,
         {"values": row.differences} if row.differences else None, _cell(row.difference), row.p,
         row.improvement, *costs(group, variant)]
        for group, row in zip(chosen, rows, strict=True)
    ]  # fmt: skip
    return _table(chosen, columns, cells)


def by_variant(
    group: Group, protocol: str, metrics: Sequence[str], variants: Sequence[str] = ()
) -> Table:
    """Returns the table of one group with a row per variant (default: all) and a column per kind of
    queries; a cell has the metrics, joined.

    Raises:
      UserError: the runs have no such variant, protocol or metric.
    """
    columns = [Column("variant"), Column("search cost")]
    columns += [Column(HEADS[name], scale=PERCENT) for name in CONDITIONS]
    tables = [result["metrics"]["test"] for result in group.results]
    common = [name for name in tables[0] if all(name in each for each in tables)]
    cells = []
    for variant in variants or common:
        found = _figures(group, variant, protocol, metrics)
        cells.append([variant, _search_cost(group, variant), *map(_joint, found)])
    return _table([group], columns, cells)


def by_condition(
    chosen: Sequence[Group], against: str, variant: str, protocol: str, metrics: Sequence[str]
) -> Table:
    """Returns the table of one variant with a row per group and a column per kind of queries; a
    cell has the metrics, joined. With a group of reference also the paired differences to it, over
    the seeds in common. The seconds of all training steps are the median over the seeds.

    Args:
      chosen: groups of `groups`.
      against: name of the group of reference; empty: no differences.

    Raises:
      UserError: as `compared`, or the runs have no such protocol or metric.
    """
    if against:
        choose("--against", against, {group.name: None for group in chosen})
    figures = {group.name: _figures(group, variant, protocol, metrics) for group in chosen}
    reference = next((group for group in chosen if group.name == against), None)
    columns = [Column("group"), Column("seeds", digits=0), Column("search cost"),
               Column("training, s", digits=0)]  # fmt: skip
    columns += [Column(HEADS[name], scale=PERCENT) for name in CONDITIONS]
    if reference is not None:
        columns += [Column(f"difference, {HEADS[name]}", sign=True, scale=PERCENT)
                    for name in CONDITIONS]  # fmt: skip
    cells = []
    for group in chosen:
        # The median, because a run may have been interrupted or shared its machine.
        seconds = np.median([result["timings"]["training_steps"] for result in group.results])
        row = [group.name, len(group.seeds), _search_cost(group, variant), float(seconds)]
        row += map(_joint, figures[group.name])
        if reference is not None and group is not reference:
            one, other = _paired(group, reference)
            row += [_joint(own[:, one] - theirs[:, other])
                    for own, theirs in zip(figures[group.name], figures[against], strict=True)
                    ]  # fmt: skip
        elif reference is not None:
            row += [None] * len(CONDITIONS)
        cells.append(row)
    return _table(chosen, columns, cells)


def _figures(
    group: Group, variant: str, protocol: str, metrics: Sequence[str]
) -> list[Float64[np.ndarray, "metrics seeds"]]:
    """The metrics of a variant in every run, for each of `CONDITIONS`.

    Raises:
      UserError: a run has no such variant, protocol or metric.
    """
    found = []
    for result in group.results:
        table = result["metrics"]["test"]
        known = {name: None for name in table["fused"] if name not in ("cost", "fusion")}
        choose("--protocol", protocol, known)
        choose("--variant", variant, table)
        of_run = [table[variant][protocol][condition] for condition in CONDITIONS]
        for metric in metrics:
            choose("--metric", metric, of_run[0])
        found.append([[each[metric] for metric in metrics] for each in of_run])
    return [*np.asarray(found, np.float64).transpose(1, 2, 0)]


def _joint(values: Float64[np.ndarray, "metrics seeds"]) -> list[dict[str, list[float]]]:
    return [{"values": each} for each in values.tolist()]


def _search_cost(group: Group, variant: str) -> float | None:
    """Mean over the runs, which may have chosen different fusions; None for raw pixels."""
    paid = [result["metrics"]["test"][variant]["cost"] for result in group.results]
    return None if None in paid else float(np.mean(paid))


def restoration(group: Group) -> Table:
    """Returns the PSNR before and after G of every corruption, in dB."""
    columns = [Column("corruption"), Column("before"), Column("after"),
               Column("gain", digits=2, sign=True)]  # fmt: skip
    each = [result["metrics"]["restoration"] for result in group.results]
    config = group.results[0]["config"]["data"]
    trained = [name for name in each[0] if name in config["corruptions"]]
    others = [name for name in each[0] if name not in (*trained, "clean")]

    def gains(name: str) -> np.ndarray:
        return np.asarray([one[name]["psnr_out"] - one[name]["psnr_in"] for one in each])

    def row(name: str, shown: str) -> list[Any]:
        before, after = (float(np.mean([one[name][key] for one in each]))
                         for key in ("psnr_in", "psnr_out"))  # fmt: skip
        return [shown, before, after, {"values": gains(name).tolist()}]

    cells = [row(name, name.replace("_", " ")) for name in trained]
    if trained:
        mean = np.mean([gains(name) for name in trained], axis=0)
        cells.append(["mean of the trained", None, None, {"values": mean.tolist()}])
    cells += [row(name, f"{name.replace('_', ' ')}, held back") for name in others]
    clean = float(np.mean([one["clean"]["psnr_out"] for one in each]))
    cells.append(["none (clean)", None, clean, None])
    return _table([group], columns, cells)


def _cell(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else dict(estimate.__dict__)


def _table(chosen: Sequence[Group], columns: Sequence[Column], cells: Sequence[Any]) -> Table:
    results = [result for group in chosen for result in group.results]
    seeds = sorted({seed for group in chosen for seed in group.seeds})
    return Table(
        columns=columns, rows=cells, seeds=seeds,
        command="; ".join(dict.fromkeys(_command(group.runs[0].path) for group in chosen)),
        commit=", ".join(sorted({result["commit"] or "unknown" for result in results})),
        date=", ".join(sorted({result["date"][:10] for result in results})),
        hardware=", ".join(sorted({result["hardware"] for result in results})),
    )  # fmt: skip


def _command(path: Path) -> str:
    """The command of a run without its seed: the scale with fewer changed settings, and those. Of
    paths only the last part is written."""
    experiment, config = cast(tuple[str, ExperimentConfig], Workdir(path).stored())
    now = configuration.flatten(config)
    found = []
    for scale in ("laptop", "full"):
        recipe = configuration.flatten(configured(experiment, scale, {}))
        words = [f"python -m experiments.run --exp={experiment} --scale={scale}"]
        for name, value in now.items():
            if name != SEED and not name.startswith("launch.") and value != recipe.get(name, value):
                local = isinstance(value, str) and (name.endswith("path") or value.startswith("/"))
                text = Path(value).name if local else value
                listed = isinstance(value, list | tuple)
                words.append(f"--{name} {' '.join(map(str, value))}" if listed
                             else f"--{name}={text}")  # fmt: skip
        found.append(words)
    return " ".join(min(found, key=len))
