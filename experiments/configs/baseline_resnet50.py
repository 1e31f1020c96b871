"""The baseline of afa_resnet50: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_resnet50
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """As afa_resnet50: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_resnet50.config(laptop), **{"adversarial.enabled": False})
