"""AFA-SVR with an Inception v3.

Command: python -m experiments.run --exp=afa_inception_v3
Full scale fine-tunes published weights (needs the extra `hub`). Laptop scale trains from scratch.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with another backbone."""
    return afa_resnet50.on(
        laptop,
        "inception_v3",
        "hf://timm/inception_v3.tv_in1k",
        **{"data.image_size": 96 if laptop else 304},
    )
