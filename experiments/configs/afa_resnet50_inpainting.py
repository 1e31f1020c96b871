"""AFA-SVR with a generator that replaces what D finds damaged, on the synthetic objects.

Command: python -m experiments.run --exp=afa_resnet50_inpainting
Laptop scale, seed 0, 200 queries per corruption, 2026-11-29, R@1 / MAP@R in %: F 52.8 / 18.9 clean,
35.1 / 13.3 trained, 36.8 / 14.1 held-back; queries by damage 52.6 / 18.9, 38.0 / 14.0, 36.8 / 14.1,
at 1.25 times the cost. One seed: no evidence yet. G restores less noise than that of afa_resnet50.
Full scale: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with the inpainting generator and a D that localises."""
    changes = {"generator.name": "inpainting", "generator.family": "overlays"}
    if laptop:
        changes |= {
            "generator.width": 16,
            "generator.corrupt_probability": 0.6,
            "discriminator.width": 32,
            "optim.discriminator_learning_rate": 2e-3,
            "train.generator_steps": "800",
        }
    return with_changes(afa_resnet50.config(laptop), **changes)
