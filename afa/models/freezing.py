"""Freezing parts of a pretrained backbone."""

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
      stages: number of frozen stages, from the input on; their parameters and BatchNorm statistics
        are not updated.
      norm: also freeze the BatchNorm statistics of all other stages.
    """

    stages: int = 0
    norm: bool = False

    def holds(self, backbone: Any, name: str) -> bool:
        """Returns whether a part of the backbone is frozen: it belongs to a frozen stage, or to the
        published classifier, which belongs to no stage."""
        stages = [re.compile(each) for each in backbone.STAGES]
        index = next((i for i, stage in enumerate(stages) if stage.fullmatch(name)), -1)
        return index < self.stages

    @contextmanager
    def statistics(self, backbone: Any) -> Iterator[None]:
        """Context in which frozen BatchNorm layers use their stored statistics in training too."""
        if not (self.stages or self.norm):
            yield
            return
        depth = len(backbone.path)

        def intercept(
            call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
                name = context.module.path[depth]
                if self.norm or self.holds(backbone, name):
                    kwargs = kwargs | {"train": False}
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            yield
