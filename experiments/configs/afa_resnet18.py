"""AFA-SVR with a ResNet-18: the main job with the smaller backbone.

Command: python -m experiments.run --exp=afa_resnet18
On images of your own: --data.name=folder --data.path=DIR
Laptop scale, two cores of an AMD EPYC (Milan, AVX2), 2026-11-26: 3 to 5 minutes. Fused, test
classes, leave-one-out, seeds 0 to 2, mean and 95 % interval, R@1 / MAP@R in %:
  grocery (128 px shop photographs, 41 classes train, 40 test)
    clean 77.9 ± 0.7 / 27.3 ± 1.6, seen corruptions 60.1 ± 12.2 / 21.8 ± 2.1,
    unseen 61.3 ± 12.3 / 22.0 ± 3.1; one catalogue image a class: R@1 17.1 ± 5.2
  ETH-80 (40 objects train, 40 test)
    clean 87.3 ± 3.5 / 31.9 ± 2.7, seen 62.2 ± 7.5 / 22.7 ± 1.6, unseen 59.0 ± 5.5 / 22.4 ± 2.8
Full scale fine-tunes the published weights, which need the extra `hub`: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """As afa_resnet50."""
    return afa_resnet50.on(laptop, "resnet18", "hf://timm/resnet18.tv_in1k")
