"""AFA-SVR with a VGG-16.

Command: python -m experiments.run --exp=afa_vgg16
Full scale fine-tunes published weights (needs the extra `hub`). Laptop scale trains from scratch.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with another backbone."""
    return afa_resnet50.on(laptop, "vgg16", "hf://timm/vgg16.tv_in1k")
