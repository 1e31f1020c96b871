"""ResNet-18/34/50/101/152 (He et al. 2016, arXiv:1512.03385), with the stride of a bottleneck on
its 3x3 convolution (v1.5, as torchvision has it)."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers

DEPTHS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
EXPANSION = {"basic": 1, "bottleneck": 4}


class Block(nn.Module):
    """One residual block: two 3x3 convolutions (basic), or 1x1, 3x3, 1x1 (bottleneck).

    The last BatchNorm starts at zero, so that every block starts as the identity.
    """

    kind: Literal["basic", "bottleneck"]
    width: int
    strides: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x d"]:
        norm = layers.batch_norm(self.dtype, train, branch)
        out = self.width * EXPANSION[self.kind]
        if self.kind == "basic":
            plan = [(self.width, 3, self.strides), (out, 3, 1)]
        else:
            plan = [(self.width, 1, 1), (self.width, 3, self.strides), (out, 1, 1)]
        y = x
        for i, (features, kernel, strides) in enumerate(plan, start=1):
            last = i == len(plan)
            y = layers.conv(features, kernel, strides, dtype=self.dtype, name=f"conv{i}")(y)
            y = norm(y, f"norm{i}", zero=last)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = layers.conv(out, 1, self.strides, dtype=self.dtype, name="shortcut_conv")(x)
            x = norm(x, "shortcut_norm")
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Picture -> mid map (stage 3, 1/16 of the side) -> last map (stage 4, 1/32).

    With the small stem the maps are four times as large on each side: 1/4 and 1/8.
    """

    kind: Literal["basic", "bottleneck"]
    depths: tuple[int, ...]
    stem: Literal["imagenet", "small"] = "imagenet"
    width: int = 64
    dtype: layers.Dtype = jnp.float32

    def setup(self) -> None:
        kernel, strides = (7, 2) if self.stem == "imagenet" else (3, 1)
        self.stem_conv = layers.conv(self.width, kernel, strides, dtype=self.dtype)
        self.stem_norm = layers.BatchNorm(dtype=self.dtype)
        self.stages = [
            [
                Block(
                    self.kind,
                    self.width * 2**stage,
                    2 if stage > 0 and block == 0 else 1,
                    self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )
                for block in range(depth)
            ]
            for stage, depth in enumerate(self.depths)
        ]

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised picture -> mid map."""
        x = self.stem_conv(x.astype(self.dtype))
        x = nn.relu(self.stem_norm(x, train=train, branch=branch))
        if self.stem == "imagenet":
            x = layers.max_pool(x)
        for block in (block for stage in self.stages[:-1] for block in stage):
            x = block(x, train, branch)
        return x

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b v u d"]:
        """Mid map -> last map."""
        for block in self.stages[-1]:
            mid = block(mid, train, branch)
        return mid


def build(name: str, stem: Literal["imagenet", "small"], dtype: layers.Dtype) -> ResNet:
    """The named member of the family."""
    kind, depths = DEPTHS[name]
    return ResNet(kind, depths, stem, dtype=dtype)  # pyright: ignore[reportArgumentType]
