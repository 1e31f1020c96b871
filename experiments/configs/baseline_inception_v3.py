"""The baseline of afa_inception_v3: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_inception_v3
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_inception_v3


def config(laptop: bool) -> ExperimentConfig:
    """As afa_inception_v3: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_inception_v3.config(laptop), **{"adversarial.enabled": False})
