"""AFA-SVR with a ResNet-18: the main job with the smaller backbone.

Command: python -m experiments.run --exp=afa_resnet18
With your own images: --data.name=folder --data.path=DIR
Figures: docs/results.md.
Full scale fine-tunes published weights (needs the extra `hub`): not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with another backbone."""
    return afa_resnet50.on(laptop, "resnet18", "hf://timm/resnet18.tv_in1k")


def sweep() -> dict[str, tuple]:
    """The settings that matter most on new images."""
    return {"optim.learning_rate": (1e-3, 3e-3), "loss.temperature": (0.05, 0.1)}
