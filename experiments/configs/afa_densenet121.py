"""AFA-SVR with a DenseNet-121.

Command: python -m experiments.run --exp=afa_densenet121
Full scale fine-tunes published weights (needs the extra `hub`). Laptop scale trains from scratch.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with another backbone."""
    return afa_resnet50.on(laptop, "densenet121", "hf://timm/densenet121.tv_in1k")
