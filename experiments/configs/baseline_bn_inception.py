"""The baseline of afa_bn_inception: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_bn_inception
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_bn_inception


def config(laptop: bool) -> ExperimentConfig:
    """As afa_bn_inception: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_bn_inception.config(laptop), **{"adversarial.enabled": False})
