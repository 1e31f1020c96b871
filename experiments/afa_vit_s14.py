"""AFA-SVR with a ViT-S/14 of DINOv2.

Command: python -m experiments.run --exp=afa_vit_s14
Full scale fine-tunes the published weights, which need the extra `hub`; laptop scale trains from
scratch.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """As afa_resnet50."""
    base = with_changes(
        afa_resnet50.config(laptop),
        **{
            "backbone.name": "vit_s14",
            "data.image_size": 112 if laptop else 224,
        },
    )
    return base if laptop else afa_resnet50.fine_tuned(base, "hf://facebook/dinov2-small")
