"""Estimates the time and disk space of runs from finished runs of the same kind."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa import config as configuration
from afa.config import ExperimentConfig
from afa.errors import UserError
from afa.workdir import Workdir

# Settings that decide how long a run takes and how much it stores.
DECISIVE = (
    "data.name", "data.path", "data.image_size", "data.batch_size", "backbone.name",
    "embedder.", "generator.", "discriminator.", "adversarial.enabled", "adversarial.generator",
    "train.steps", "train.plain", "train.generator_steps", "train.schedule", "train.precision",
    "train.keep_best", "train.evaluate_every", "train.checkpoint_every", "evaluation.",
    "retrieval.",
)  # fmt: skip
PART_OF_TRAINING = "training_steps"


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
      seconds: of its parts together, as measured.
      bytes: of its directory.
    """

    seconds: float
    bytes: int


def kind(settings: Mapping[str, Any]) -> str:
    """Returns a text that is equal for runs that take the same time and space."""
    chosen = {name: value for name, value in settings.items() if name.startswith(DECISIVE)}
    return json.dumps(chosen, sort_keys=True, default=str)


def measured(directories: Iterable[Path]) -> dict[str, Cost]:
    """Returns the mean cost of the finished runs of each kind; other directories are left out."""
    found: dict[str, list[Cost]] = {}
    for directory in directories:
        try:
            stored = Workdir(directory).stored()
            timings = json.loads(Workdir(directory).result.read_text("utf-8"))["timings"]
            seconds = sum(timings[name] for name in timings if name != PART_OF_TRAINING)
            size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        except (OSError, ValueError, KeyError, TypeError, UserError):
            continue
        if stored is not None:
            found.setdefault(kind(configuration.flatten(stored[1])), []).append(Cost(seconds, size))
    return {
        name: Cost(sum(c.seconds for c in costs) / len(costs),
                   sum(c.bytes for c in costs) // len(costs))
        for name, costs in found.items()
    }  # fmt: skip


def of(config: ExperimentConfig, costs: Mapping[str, Cost]) -> Cost | None:
    """Returns the cost of a run; None if no run of its kind has been measured."""
    return costs.get(kind(configuration.flatten(config)))
