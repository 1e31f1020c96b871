"""The baseline of afa_resnet18: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_resnet18
Laptop scale, two cores of an AMD EPYC (Milan, AVX2), 2026-11-26: 2 to 3 minutes. Fused, as in
afa_resnet18, R@1 / MAP@R in %:
  grocery   clean 75.7 ± 1.1 / 26.2 ± 1.4, seen corruptions 57.5 ± 14.8 / 21.0 ± 2.1,
            unseen 59.9 ± 17.2 / 21.1 ± 3.2; one catalogue image a class: R@1 17.0 ± 5.5
  ETH-80    clean 86.1 ± 3.0 / 30.5 ± 2.2, seen 59.9 ± 4.3 / 21.5 ± 2.2,
            unseen 59.2 ± 3.2 / 21.6 ± 1.7
afa less baseline, paired by seed: grocery clean +2.2 ± 1.8 / +1.1 ± 0.2, ETH-80 +1.2 ± 0.8 /
+1.4 ± 0.5; F alone, without other views, +0.3 ± 0.7 / +0.3 ± 0.1 and -0.0 ± 0.7 / +0.4 ± 0.2.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_resnet18


def config(laptop: bool) -> ExperimentConfig:
    """As afa_resnet18: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_resnet18.config(laptop), **{"adversarial.enabled": False})
