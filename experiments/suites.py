"""Sets of runs that belong together: `python -m experiments.sweep --suite=NAME`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from afa.config import TRAINED_CORRUPTIONS
from afa.data.families import FAMILIES
from afa.losses import LOSSES


@dataclass(frozen=True)
class Part:
    """Experiments and values of fields, all combined."""

    exps: Sequence[str]
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """Runs of several parts; a run that is in two parts is done once.

    Attributes:
      purpose: one line.
      parts: of the suite.
      seeds: number of seeds, unless another is given.
    """

    purpose: str
    parts: Sequence[Part]
    seeds: int = 3


BACKBONES = ("resnet18", "resnet50", "densenet121", "bn_inception", "inception_v3", "vgg16",
             "squeezenet")  # fmt: skip
METHOD, BASELINE = "afa_resnet18", "baseline_resnet18"
WITHOUT_GENERATOR = {"adversarial.generator": [False]}
# G trained by the reconstruction error alone.
RESTORER_ALONE = {f"adversarial.lambda_{name}": [0.0]
                  for name in ("adversarial", "noise", "code", "features")}  # fmt: skip

WITHOUT_ONE = [tuple(name for name in TRAINED_CORRUPTIONS if name != left)
               for left in TRAINED_CORRUPTIONS]  # fmt: skip

SUITES = {
    "smoke": Suite(
        "two losses at debug size, in minutes: checks that sweeps work",
        [Part(["debug"], {"loss.name": ["norm_softmax", "arcface"]})],
        seeds=1,
    ),
    "backbones": Suite(
        "the method and its baseline with every recipe's backbone",
        [Part([f"{kind}_{name}" for name in BACKBONES for kind in ("afa", "baseline")])],
    ),
    "losses": Suite(
        "the baseline with every metric loss",
        # Random batches, as in the recipe, would have few positives.
        [Part([BASELINE], {"loss.name": sorted(LOSSES), "data.sampler": ["pk"]})],
    ),
    "corruptions": Suite(
        "the method and its baseline, trained with few to many corrupted images",
        [Part([METHOD, BASELINE], {"data.corrupt_probability": [0.0, 0.25, 0.5, 0.75]})],
    ),
    "left_out": Suite(
        "the method and its baseline without one trained corruption each, for choices",
        [Part([METHOD, BASELINE], {"data.corruptions": WITHOUT_ONE})],
    ),
    "ablation": Suite(
        "the method without each of its parts",
        [
            Part([METHOD, BASELINE]),
            Part([METHOD], WITHOUT_GENERATOR),
            Part([METHOD], {"adversarial.feature_epsilon": [0.0]}),
            Part(
                [METHOD],
                {
                    "adversarial.perturbation": [
                        "random",
                        "statistics",
                        "halves",
                        "random_statistics",
                    ]
                },
            ),
            # Controls of D: no adversarial term for restored images, none at all, and a D that
            # does not judge views.
            Part([METHOD], {"adversarial.lambda_adversarial": [0.0]}),
            Part([METHOD], RESTORER_ALONE),
            Part([METHOD], {"discriminator.judges_views": [False]}),
            # G without D's map of the damage, and the map without G.
            Part(
                [METHOD],
                {"generator.name": ["inpainting", "filling"], "generator.family": ["overlays"]},
            ),
            Part([METHOD, BASELINE], {"data.family": ["overlays", "fills"]}),
        ],
    ),
    "rivals": Suite(
        "the method, and what is cheaper: its baseline with each rival of the adversarial part",
        [
            Part([METHOD, BASELINE]),
            Part([BASELINE], {"train.consistency": [0.5]}),
            Part([BASELINE], {"data.family": sorted(FAMILIES)}),
            Part([BASELINE], {"loss.name": ["proxy_synthesis", "memvir", "cross_batch_memory"]}),
            Part([BASELINE], {"optim.sam_radius": [0.05]}),
            Part([BASELINE], {"backbone.name": ["resnet34"]}),
            Part([BASELINE], {"evaluation.views": [("flip", "median", "clahe", "zoom")]}),
            Part([METHOD], {"adversarial.perturbation": ["mixstyle"]} | WITHOUT_GENERATOR),
            Part([METHOD], RESTORER_ALONE),
        ],
    ),
}
