"""AFA-SVR with a ViT-S/14 of DINOv2.

Command: python -m experiments.run --exp=afa_vit_s14
Full scale fine-tunes published weights (needs the extra `hub`). Laptop scale trains from scratch.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with another backbone."""
    return afa_resnet50.on(
        laptop,
        "vit_s14",
        "hf://facebook/dinov2-small",
        **{"data.image_size": 112 if laptop else 224},
    )
