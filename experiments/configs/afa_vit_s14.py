"""AFA-SVR with a ViT-S/14 of DINOv2.

Command: python -m experiments.run --exp=afa_vit_s14
Full scale fine-tunes the published weights, which need the extra `hub`; laptop scale trains from
scratch.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """As afa_resnet50."""
    return afa_resnet50.on(
        laptop,
        "vit_s14",
        "hf://facebook/dinov2-small",
        **{"data.image_size": 112 if laptop else 224},
    )
