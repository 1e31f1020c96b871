"""The baseline of afa_densenet121: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_densenet121
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_densenet121


def config(laptop: bool) -> ExperimentConfig:
    """As afa_densenet121: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_densenet121.config(laptop), **{"adversarial.enabled": False})
