"""Tables over many runs: groups of seeds, intervals, paired differences, and costs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from afa import config as configuration
from afa.errors import UserError, choose
from afa.evaluation import statistics
from afa.evaluation.statistics import Estimate
from afa.runs.compare import Run, common_figures, load
from afa.workdir import Workdir

LEAST_SEEDS = 3  # fewer give no interval over seeds
LEAST_FOR_IQM = 5
SEED = "seed"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
      name: experiment, and the values of the fields that the runs are grouped by.
      seeds: in ascending order.
      runs: of the seeds.
      costs: parameters, seconds per step, megabytes of the index; means over the runs.
    """

    name: str
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One group in a table of one variant, protocol and condition.

    Attributes:
      group: name.
      seeds: number of runs.
      mean: mean of the metric over queries and runs.
      over_seeds: half-width of the 95 % interval over seeds; None for fewer than three.
      classes: the mean with the interval of a bootstrap over classes.
      iqm: interquartile mean over seeds; None for fewer than five.
      difference: to the group of reference, over common seeds, with the interval of a bootstrap
        over classes; None without a reference.
      seeds_of_difference: half-width of its interval over seeds; None for fewer than three.
      p: p-value of its sign-flip test over classes, adjusted for all rows of the table (Holm).
      improvement: probability that a run is better than one of the reference; None for fewer than
        five seeds.
    """

    group: str
    seeds: int
    mean: float
    over_seeds: float | None
    classes: Estimate
    iqm: float | None
    difference: Estimate | None = None
    seeds_of_difference: float | None = None
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
    each = [costs(run.path) for run in runs]
    means = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
    return Group(name, seeds, runs, means)


def costs(path: Path) -> dict[str, float]:
    """Returns parameters, seconds of a training step and megabytes of the index of a run."""
    workdir = Workdir(path)
    result = json.loads(workdir.result.read_text("utf-8"))
    size = sum(file.stat().st_size for file in workdir.embeddings.rglob("*") if file.is_file())
    return {
        "parameters": float(sum(result["parameters"].values())),
        "seconds per step": result["timings"]["training_steps"] / max(result["step"], 1),
        "index MiB": size / 2**20,
    }


def table(
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
            len(each),
            float(each.mean()),
            half_width(each),
            statistics.bootstrap(own.mean(axis=0), labels),
            statistics.interquartile_mean(each) if len(each) >= LEAST_FOR_IQM else None,
        )
        if reference is not None and group is not reference:
            row = _compared(row, group, reference, values, labels)
        rows.append(row)
    compared = [i for i, row in enumerate(rows) if row.p is not None]
    adjusted = statistics.holm([rows[i].p or 0.0 for i in compared])
    for i, p in zip(compared, adjusted, strict=True):
        rows[i] = Row(**{**rows[i].__dict__, "p": float(p)})
    return rows


def half_width(values: Float64[np.ndarray, "seeds"]) -> float | None:
    """Half-width of the 95 % interval over seeds; None for fewer than three."""
    return statistics.mean_and_interval(values)[1] if len(values) >= LEAST_SEEDS else None


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


def _compared(
    row: Row,
    group: Group,
    reference: Group,
    values: Mapping[str, Float64[np.ndarray, "seeds q"]],
    labels: np.ndarray,
) -> Row:
    shared = [seed for seed in group.seeds if seed in reference.seeds]
    if not shared:
        raise UserError(f"{group.name} and {reference.name} have no seed in common")
    one, other = (
        values[each.name][[each.seeds.index(seed) for seed in shared]]
        for each in (group, reference)
    )
    each, others = np.nanmean(one, axis=1), np.nanmean(other, axis=1)
    enough = len(shared) >= LEAST_FOR_IQM
    return Row(
        **{
            **row.__dict__,
            "difference": statistics.bootstrap((one - other).mean(axis=0), labels),
            "seeds_of_difference": half_width(each - others),
            "p": statistics.sign_flip(one.mean(axis=0), other.mean(axis=0), labels),
            "improvement": statistics.probability_of_improvement(each, others) if enough else None,
        }
    )
