"""AFA-SVR with a BN-Inception.

Command: python -m experiments.run --exp=afa_bn_inception
Full scale fine-tunes bn_inception-52deb4733.pth of pretrainedmodels, which has to lie in the
working directory; laptop scale trains from scratch, unless told otherwise: --backbone.weights=FILE
--backbone.frozen_norm=True --optim.backbone_rate=0.1 --optim.head_warmup=1ep.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """As afa_resnet50."""
    return afa_resnet50.on(laptop, "bn_inception", "bn_inception-52deb4733.pth")
