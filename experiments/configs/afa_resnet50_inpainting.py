"""AFA-SVR with a generator that replaces what D finds damaged, on the synthetic objects.

Command: python -m experiments.run --exp=afa_resnet50_inpainting
Not measured yet with these settings.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with the inpainting generator and a D that localises."""
    return inpainting(afa_resnet50.config(laptop), laptop)


def inpainting(recipe: ExperimentConfig, laptop: bool) -> ExperimentConfig:
    """Returns a recipe with the inpainting generator, and at laptop scale with networks so small
    that they cost less than 0.4 passes of a SqueezeNet."""
    changes = {
        "generator.name": "inpainting",
        "generator.family": "overlays",
        "generator.family_probability": 0.6,
    }
    if laptop:
        changes |= {
            "generator.width": 6,
            "generator.levels": 3,
            "generator.blocks": 1,
            "generator.corrupt_probability": 0.6,
            "discriminator.width": 16,
            "discriminator.levels": 3,
            "optim.discriminator_learning_rate": 6e-3,
            "train.generator_steps": "1200",
        }
    return with_changes(recipe, **changes)
