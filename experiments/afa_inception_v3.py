"""AFA-SVR with an Inception v3.

Command: python -m experiments.run --exp=afa_inception_v3
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
            "backbone.name": "inception_v3",
            "data.image_size": 96 if laptop else 304,
        },
    )
    return base if laptop else afa_resnet50.fine_tuned(base, "hf://timm/inception_v3.tv_in1k")
