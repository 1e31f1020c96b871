"""AFA-SVR with a SqueezeNet 1.0.

Command: python -m experiments.run --exp=afa_squeezenet
Full scale fine-tunes torchvision's squeezenet1_0-b66bff10.pth, which must be in the working
directory. Laptop scale trains from scratch; to fine-tune, add --backbone.weights=FILE
--optim.backbone_rate=0.1 --optim.head_warmup=1ep.
Hardware, wall time: 2 CPU cores at laptop scale (320 steps, 64 px), about 160 s from a folder.
Figures: grocery_128 (41 classes train, 40 others test), seeds 0 to 2, mean and 95 % interval, test
R@1 / MAP@R leave-one-out, and R@1 among catalogue images:
  fine-tuned    91.2 ± 1.0 / 43.5 ± 1.4, catalogue 31.6 ± 7.5
  from scratch  54.0 ± 7.7 / 12.0 ± 3.0, catalogue  3.5 ± 2.3
(--data.name=folder, 26 November 2026). The synthetic set and full scale: not measured yet.
"""

from afa.config import ExperimentConfig
from experiments.configs import afa_resnet50


def config(laptop: bool) -> ExperimentConfig:
    """Same as afa_resnet50, with another backbone."""
    return afa_resnet50.on(laptop, "squeezenet1_0", "squeezenet1_0-b66bff10.pth")
