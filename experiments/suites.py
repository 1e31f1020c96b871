"""Sets of runs that belong together: `python -m experiments.sweep --suite=NAME`.

A suite about the method can be run with any experiment `afa_X`, on any data set.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from afa.config import RANDOM, TRAINED_CORRUPTIONS, ExperimentConfig
from afa.data.families import FAMILIES
from afa.losses import LOSSES


@dataclass(frozen=True)
class Part:
    """Experiments and values of fields, all combined."""

    exps: Sequence[str]
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What a suite is about.

    Attributes:
      method, baseline: names of two experiments.
      config: of the baseline.
    """

    method: str
    baseline: str
    config: ExperimentConfig


@dataclass(frozen=True)
class Suite:
    """Runs of several parts; a run that is in two parts is done once.

    Attributes:
      purpose: one line.
      parts: the parts, for a subject.
      seeds: number of seeds, unless another is given.
      any_method: whether it can be about another method than `METHOD`.
    """

    purpose: str
    parts: Callable[[Subject], Sequence[Part]]
    seeds: int = 3
    any_method: bool = True


BACKBONES = ("resnet18", "resnet50", "densenet121", "bn_inception", "inception_v3", "vgg16",
             "squeezenet")  # fmt: skip
METHOD = "afa_resnet18"  # unless another is given
# A wider network, with random initial weights.
WIDER = {"resnet18": "resnet34", "resnet50": "resnet101", "densenet121": "densenet169",
         "vgg16": "vgg19"}  # fmt: skip
WITHOUT_GENERATOR = {"adversarial.generator": [False]}
# G trained by the reconstruction error alone.
RESTORER_ALONE = {f"adversarial.lambda_{name}": [0.0]
                  for name in ("adversarial", "noise", "code", "features")}  # fmt: skip
WITHOUT_ONE = [tuple(name for name in TRAINED_CORRUPTIONS if name != left)
               for left in TRAINED_CORRUPTIONS]  # fmt: skip


def twice(duration: str) -> str:
    """A duration of twice the length: "500", "20ep"."""
    return re.sub(r"^[0-9.]+", lambda number: f"{2 * float(number[0]):g}", duration)


def _ablation(subject: Subject) -> list[Part]:
    both, method = [subject.method, subject.baseline], [subject.method]
    controls = ["random", "statistics", "either", "random_statistics"]
    return [
        Part(both),
        Part(method, WITHOUT_GENERATOR),
        Part(method, {"adversarial.feature_epsilon": [0.0]}),
        Part(method, {"adversarial.perturbation": controls}),
        # Controls of D: no adversarial term for restored images, none at all, and a D that does
        # not judge views.
        Part(method, {"adversarial.lambda_adversarial": [0.0]}),
        Part(method, RESTORER_ALONE),
        Part(method, {"discriminator.judges_views": [False]}),
        # G without D's map of the damage, and the map without G.
        Part(
            method,
            {
                "generator.name": ["residual", "inpainting", "filling"],
                "generator.family": ["overlays"],
            },
        ),
        Part(both, {"data.family": ["overlays", "fills"]}),
    ]


def _rivals(subject: Subject) -> list[Part]:
    baseline, method, config = [subject.baseline], [subject.method], subject.config
    parts = [
        Part([subject.method, subject.baseline]),
        Part(baseline, {"train.steps": [twice(config.train.steps)]}),
        Part(baseline, {"train.consistency": [0.5]}),
        Part(baseline, {"data.family": ["", *sorted(FAMILIES)]}),
        Part(baseline, {"loss.name": ["proxy_synthesis", "memvir", "cross_batch_memory"]}),
        Part(baseline, {"optim.sam_radius": [0.05]}),
        Part(baseline, {"evaluation.views": [("flip", "median", "clahe", "zoom")]}),
        Part(method, {"adversarial.perturbation": ["mixstyle"]} | WITHOUT_GENERATOR),
        Part(method, RESTORER_ALONE),
    ]
    if config.backbone.weights != RANDOM:
        # Only the linear layers of the heads are trained.
        parts.append(Part(baseline, {"backbone.frozen_stages": [_stages(config)]}))
    elif wider := WIDER.get(config.backbone.name):
        parts.append(Part(baseline, {"backbone.name": [wider]}))
    return parts


def _stages(config: ExperimentConfig) -> int:
    from afa.models.networks import build_backbone

    return len(build_backbone(config).STAGES)


SUITES = {
    "smoke": Suite(
        "two losses at debug size, in minutes: checks that sweeps work",
        lambda _: [Part(["debug"], {"loss.name": ["norm_softmax", "arcface"]})],
        seeds=1,
        any_method=False,
    ),
    "backbones": Suite(
        "the method and its baseline with every recipe's backbone",
        lambda _: [Part([f"{kind}_{name}" for name in BACKBONES for kind in ("afa", "baseline")])],
        any_method=False,
    ),
    "losses": Suite(
        "the baseline with every metric loss",
        # Random batches, as in the recipe, would have few positives.
        lambda subject: [
            Part([subject.baseline], {"loss.name": sorted(LOSSES), "data.sampler": ["pk"]})
        ],
    ),
    "corruptions": Suite(
        "the method and its baseline, trained with few to many corrupted images",
        lambda subject: [
            Part(
                [subject.method, subject.baseline],
                {"data.corrupt_probability": [0.0, 0.25, 0.5, 0.75]},
            )
        ],
    ),
    "left_out": Suite(
        "the method and its baseline without one trained corruption each, for choices",
        lambda subject: [
            Part([subject.method, subject.baseline], {"data.corruptions": WITHOUT_ONE})
        ],
    ),
    "ablation": Suite("the method without each of its parts", _ablation),
    "rivals": Suite(
        "the method, and what is cheaper: its baseline with each rival of the adversarial part",
        _rivals,
    ),
}
