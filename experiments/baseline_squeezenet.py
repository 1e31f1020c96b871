"""The baseline of afa_squeezenet: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_squeezenet
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments import afa_squeezenet


def config(laptop: bool) -> ExperimentConfig:
    """As afa_squeezenet: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_squeezenet.config(laptop), **{"adversarial.enabled": False})
