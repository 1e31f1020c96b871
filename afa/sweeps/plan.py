"""Plans a sweep: experiments, values of settings and seeds -> runs, named by what they compute."""

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afa import config as configuration
from afa.checks import refuse_unread, validate
from afa.config import LOSS_NAME, ExperimentConfig, with_changes
from afa.errors import UserError
from afa.runs.start import configured

Values = Mapping[str, Sequence[Any]]  # field -> its values

# Fields that change nothing in the results.
WITHOUT_EFFECT = (
    "launch.", "train.parallel", "train.log_every", "data.read_threads", "data.cache",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
      name: experiment and hash of the configuration; the name of its directory.
      exp, scale: recipe and its scale.
      changes: changed fields; `seed` is one of them.
      config: the complete configuration.
    """

    name: str
    exp: str
    scale: str
    changes: dict[str, Any]
    config: ExperimentConfig

    @property
    def digest(self) -> str:
        return self.name.rpartition("-")[2]

    def words(self) -> list[str]:
        """Returns the fields of the command `experiments.run`."""
        found = [f"--exp={self.exp}", f"--scale={self.scale}"]
        for name, value in self.changes.items():
            if isinstance(value, list | tuple):
                found += [f"--{name}", *map(str, value)]
            else:
                found.append(f"--{name}={value}")
        return found


def digest(config: ExperimentConfig) -> str:
    """Returns a hash of all settings that affect what a run computes: ten hexadecimal digits."""
    settings = {
        name: value
        for name, value in configuration.flatten(config).items()
        if not name.startswith(WITHOUT_EFFECT)
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def combinations(grid: Values, zipped: Sequence[Values], chosen: int = 0) -> list[dict[str, Any]]:
    """Returns the changes of every combination.

    Args:
      grid: fields whose values are combined with all others.
      zipped: groups of fields; the values of a group change together.
      chosen: number of combinations to draw at random, always the same ones; 0 for all.

    Raises:
      UserError: a field without values or given twice, a group with different numbers of values,
        or fewer combinations than `chosen`.
    """
    axes: list[list[dict[str, Any]]] = []
    seen: set[str] = set()
    groups = [{name: values} for name, values in grid.items()]
    for group in [*groups, *map(dict, zipped)]:
        for name, values in group.items():
            if name in seen:
                raise UserError(f"{name} is given twice")
            if not values:
                raise UserError(f"{name} has no values")
            seen.add(name)
        lengths = {name: len(values) for name, values in group.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise UserError(f"--zip needs as many values for every field: {counts}")
        rows = zip(*group.values(), strict=True)
        axes.append([dict(zip(group, row, strict=True)) for row in rows])
    found = [
        {name: value for part in parts for name, value in part.items()}
        for parts in itertools.product(*axes)
    ]
    if chosen > len(found):
        raise UserError(f"--random={chosen}: there are only {len(found)} combinations")
    if chosen:
        found = [found[i] for i in sorted(random.Random(0).sample(range(len(found)), chosen))]
    return found


def plan(
    exps: Sequence[str],
    changes: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    scale: str,
) -> list[Planned]:
    """Returns the runs of a sweep, without repetitions; all runs of a seed share their batches.

    Args:
      exps: names of recipes.
      changes: changed fields of every combination.
      seeds: seeds of every combination.
      scale: of the recipes, "laptop" or "full".

    Raises:
      UserError: an unknown recipe, field or value.
    """
    found: dict[str, Planned] = {}
    for exp, changed, seed in itertools.product(exps, changes, seeds):
        fields = {**changed, "seed": seed}
        recipe = configured(exp, scale, fields)
        if LOSS_NAME in fields:
            recipe = with_changes(recipe, **{LOSS_NAME: fields[LOSS_NAME]})
        config = with_changes(recipe, **fields)
        refuse_unread(config, recipe)
        validate(config)
        key = digest(config)
        found.setdefault(key, Planned(f"{exp}-{key}", exp, scale, fields, config))
    return list(found.values())
