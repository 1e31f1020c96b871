"""AFA-SVR with a SqueezeNet 1.0 and a generator that replaces what D finds damaged.

Command: python -m experiments.run --exp=afa_squeezenet_inpainting --data.name=folder \\
  --data.path=DATA --backbone.weights=squeezenet1_0-b66bff10.pth --optim.backbone_rate=0.1 \\
  --optim.head_warmup=1ep
Figures: docs/results.md. Full scale: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_squeezenet
from experiments.configs.afa_resnet50_inpainting import inpainting


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_squeezenet, with the inpainting generator; F also learns from overlays."""
    changes = {"data.family": "overlays"}
    if laptop:
        changes |= {
            "data.corrupt_probability": 0.5,
            "train.steps": "800",
            "train.plain": "600",
            "adversarial.lambda_features": 2.0,
            "train.generator_steps": "1500",
            "evaluation.severities": (3, 5),
            "evaluation.views": ("median",),
        }
    return with_changes(inpainting(afa_squeezenet.config(laptop), laptop), **changes)
