"""AFA-SVR with a ResNet-18: the main job with the smaller backbone.

Command: python -m experiments.run --exp=afa_resnet18
"""

from afa.config import ExperimentConfig, with_changes
from experiments import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """As afa_resnet50."""
    return with_changes(afa_resnet50.config(laptop), **{"backbone.name": "resnet18"})
