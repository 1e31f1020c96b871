"""AFA-SVR with a ResNet-50 on Cars-196.

Command: python -m experiments.run --exp=afa_resnet50_cars --scale=full --data.path=TFDS_DATA_DIR
Full scale fine-tunes published weights (`afa_resnet50`), or trains from scratch with
--backbone.weights=random.
Hardware and wall time: not measured yet; tested at laptop scale on random data with the same
features.
Published baseline: Proxy-Anchor, ResNet-50, 512-d: R@1 87.7 %
(authors' table, github.com/tjddus9597/Proxy-Anchor-CVPR2020, pretrained on ImageNet).
Protocol: the first 98 classes train and validate, the last 98 test.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Proxy-Anchor with its authors' scale and margin, 512 dimensions, 224 px."""
    return with_changes(
        afa_resnet50.config(laptop),
        **{
            "data.name": "tfds:cars196",
            "data.crop_fraction": 0.875,
            "loss.name": "proxy_anchor",
        }
        # The backbone is trained at 1e-4, as by its authors: a tenth of the rate of new parts.
        | ({} if laptop else {"train.steps": "60ep"}),
    )
