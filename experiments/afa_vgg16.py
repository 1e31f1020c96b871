"""AFA-SVR with a VGG-16.

Command: python -m experiments.run --exp=afa_vgg16
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
            "backbone.name": "vgg16",
        },
    )
    return base if laptop else afa_resnet50.fine_tuned(base, "hf://timm/vgg16.tv_in1k")
