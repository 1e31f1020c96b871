"""AFA-SVR with a ResNet-18: the main job with the smaller backbone.

Command: python -m experiments.run --exp=afa_resnet18
With your own images: --data.name=folder --data.path=DIR
Laptop scale, two cores of an AMD EPYC (Milan, AVX2), 2026-11-26: 3 to 5 minutes. Fused, test
classes, leave-one-out, seeds 0 to 2, mean and 95 % interval, R@1 / MAP@R in %:
  grocery (128 px shop photographs, 41 classes train, 40 test)
    clean 77.9 ± 0.7 / 27.3 ± 1.6, trained corruptions 60.1 ± 12.2 / 21.8 ± 2.1,
    held-back 61.3 ± 12.3 / 22.0 ± 3.1; one catalogue image per class: R@1 17.1 ± 5.2
  ETH-80 (40 objects train, 40 test)
    clean 87.3 ± 3.5 / 31.9 ± 2.7, trained corruptions 62.2 ± 7.5 / 22.7 ± 1.6,
    held-back 59.0 ± 5.5 / 22.4 ± 2.8
Full scale fine-tunes published weights (needs the extra `hub`): not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with another backbone."""
    return afa_resnet50.on(laptop, "resnet18", "hf://timm/resnet18.tv_in1k")
