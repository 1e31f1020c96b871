"""What of a pretrained backbone stays as it is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from afa.models.layers import BatchNorm


@dataclass(frozen=True)
class Frozen:
    """Frozen parts of a backbone.

    Attributes:
      stages: how many, from the image upwards; their parameters and statistics do not move.
      norm: whether the statistics of all other stages keep still too.
    """

    stages: int = 0
    norm: bool = False

    def holds(self, backbone: Any, name: str) -> bool:
        """Whether a part of the backbone is not trained: one of a frozen stage, or of the published
        classifier, which belongs to no stage."""
        stages = [re.compile(each) for each in backbone.STAGES]
        at = next((i for i, stage in enumerate(stages) if stage.fullmatch(name)), -1)
        return at < self.stages

    @contextmanager
    def statistics(self, backbone: Any) -> Iterator[None]:
        """Inside, every BatchNorm of a still part takes its stored statistics in training too."""
        if not (self.stages or self.norm):
            yield
            return
        depth = len(backbone.path)

        def still(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
                name = context.module.path[depth]
                if self.norm or self.holds(backbone, name):
                    kwargs = kwargs | {"train": False}
            return call(*args, **kwargs)

        with nn.intercept_methods(still):
            yield
