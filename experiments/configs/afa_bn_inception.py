"""AFA-SVR with a BN-Inception.

Command: python -m experiments.run --exp=afa_bn_inception
Full scale fine-tunes bn_inception-52deb4733.pth of pretrainedmodels, which must be in the working
directory. Laptop scale trains from scratch; to fine-tune, add --backbone.weights=FILE
--backbone.frozen_norm=True --optim.backbone_rate=0.1 --optim.head_warmup=1ep.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with another backbone."""
    return afa_resnet50.on(laptop, "bn_inception", "bn_inception-52deb4733.pth")
