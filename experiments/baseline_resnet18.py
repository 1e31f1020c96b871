"""The baseline of afa_resnet18: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_resnet18
"""

from afa.config import ExperimentConfig, with_changes
from experiments import afa_resnet18


def config(laptop: bool) -> ExperimentConfig:
    """As afa_resnet18: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_resnet18.config(laptop), **{"adversarial.enabled": False})
