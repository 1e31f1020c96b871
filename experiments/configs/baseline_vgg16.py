"""The baseline of afa_vgg16: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_vgg16
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_vgg16


def config(laptop: bool) -> ExperimentConfig:
    """As afa_vgg16: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_vgg16.config(laptop), **{"adversarial.enabled": False})
