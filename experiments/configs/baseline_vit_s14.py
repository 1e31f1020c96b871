"""The baseline of afa_vit_s14: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_vit_s14
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_vit_s14


def config(laptop: bool) -> ExperimentConfig:
    """As afa_vit_s14: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_vit_s14.config(laptop), **{"adversarial.enabled": False})
