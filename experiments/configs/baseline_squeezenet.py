"""The baseline of afa_squeezenet: the same without the adversarial part.

Command: python -m experiments.run --exp=baseline_squeezenet
Hardware, wall time: 2 CPU cores at laptop scale (280 steps, 64 px), about 60 s from a folder.
Figures: grocery_128 (41 classes train, 40 others test), seeds 0 to 2, mean and 95 % interval, test
R@1 / MAP@R leave-one-out, and R@1 among catalogue images:
  fine-tuned    90.0 ± 1.0 / 42.7 ± 2.9, catalogue 33.6 ± 4.1
  from scratch  19.1 ± 5.1 /  3.3 ± 1.2, catalogue  4.8 ± 2.3
(--data.name=folder, 26 November 2026). The synthetic set and full scale: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes
from experiments.configs import afa_squeezenet


def config(laptop: bool) -> ExperimentConfig:
    """As afa_squeezenet: data, labelled steps, sizes, augmentations and learning rates."""
    return with_changes(afa_squeezenet.config(laptop), **{"adversarial.enabled": False})
