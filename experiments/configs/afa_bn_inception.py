"""AFA-SVR with a BN-Inception.

Command: python -m experiments.run --exp=afa_bn_inception
From scratch, unless told otherwise: its published weights are on no hub. With a file of them (which
one, says experiments.weights --list) fine-tune: --backbone.weights=FILE --backbone.frozen_norm=True
--optim.backbone_rate=0.1 --optim.head_warmup=1ep.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """As afa_resnet50."""
    return afa_resnet50.on(laptop, "bn_inception")
