"""ResNet-18/34/50/101/152 (He et al. 2016, arXiv:1512.03385), with the stride of a bottleneck on
its 3x3 convolution (v1.5, as in torchvision), ResNeXt-50 32x4d (Xie et al. 2017,
arXiv:1611.05431) and Wide-ResNet-50-2 (Zagoruyko & Komodakis 2016, arXiv:1605.07146)."""

import functools
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import Member, Options

Kind = Literal["basic", "bottleneck"]

EXPANSION = {"basic": 1, "bottleneck": 4}


class Block(nn.Module):
    """One residual block: two 3x3 convolutions (basic), or 1x1, 3x3, 1x1 (bottleneck).

    The scale of the last BatchNorm is initialised to zero, so that the block is the identity.

    Attributes:
      width: base number of channels; the output has `width * EXPANSION[kind]`.
      groups, group_width: of the 3x3 convolution of a bottleneck, which has
        `groups * width * group_width / 64` channels.
    """

    kind: Kind
    width: int
    strides: int
    dtype: layers.Dtype = jnp.float32
    groups: int = 1
    group_width: int = 64

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x d"]:
        norm = functools.partial(layers.BatchNorm, dtype=self.dtype)
        conv = functools.partial(layers.conv, dtype=self.dtype)
        out = self.width * EXPANSION[self.kind]
        inner = self.groups * self.width * self.group_width // 64
        if self.kind == "basic":
            plan = [(self.width, 3, self.strides, 1), (out, 3, 1, 1)]
        else:
            plan = [(inner, 1, 1, 1), (inner, 3, self.strides, self.groups), (out, 1, 1, 1)]
        y = x
        for i, (features, kernel, strides, groups) in enumerate(plan, start=1):
            last = i == len(plan)
            start = nn.initializers.zeros if last else nn.initializers.ones
            y = conv(features, kernel, strides, groups=groups, name=f"conv{i}")(y)
            y = norm(scale_init=start, name=f"bn{i}")(y, train=train, branch=branch)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = conv(out, 1, self.strides, name="downsample.0")(x)
            x = norm(name="downsample.1")(x, train=train, branch=branch)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Image -> mid map (stage 3, 1/16 of the side) -> last map (stage 4, 1/32).

    With the small stem the maps are four times as large on each side: 1/4 and 1/8.
    """

    kind: Kind
    depths: tuple[int, ...]
    options: Options = Options()
    width: int = 64
    groups: int = 1
    group_width: int = 64

    STAGES = (r"conv1|bn1", r"layer1\..*", r"layer2\..*", r"layer3\..*", r"layer4\..*")

    def setup(self) -> None:
        options = self.options
        kernel, strides = (7, 2) if options.stem == "imagenet" else (3, 1)
        self.conv1 = layers.conv(self.width, kernel, strides, dtype=options.dtype)
        self.bn1 = layers.BatchNorm(dtype=options.dtype)
        self.stages = [
            [
                options.block(Block)(
                    self.kind,
                    self.width * 2**stage,
                    2 if stage > 0 and block == 0 else 1,
                    options.dtype,
                    self.groups,
                    self.group_width,
                    name=f"layer{stage + 1}.{block}",
                )
                for block in range(depth)
            ]
            for stage, depth in enumerate(self.depths)
        ]
        if options.classes:
            self.fc = nn.Dense(options.classes, dtype=options.dtype)

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised image -> mid map."""
        x = self.conv1(x.astype(self.options.dtype))
        x = nn.relu(self.bn1(x, train=train, branch=branch))
        if self.options.stem == "imagenet":
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

    def logits(self, last: Float[Array, "b v u d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network."""
        return self.fc(last.mean((1, 2)))


def _member(
    kind: Kind, depths: tuple[int, ...], source: str, groups: int = 1, group_width: int = 64
) -> Member:
    def build(options: Options) -> ResNet:
        return ResNet(kind, depths, options, groups=groups, group_width=group_width)

    return Member(build, source, stems=("imagenet", "small"))


MEMBERS = {
    "resnet18": _member("basic", (2, 2, 2, 2), "torchvision resnet18-f37072fd.pth"),
    "resnet34": _member("basic", (3, 4, 6, 3), "torchvision resnet34-b627a593.pth"),
    "resnet50": _member("bottleneck", (3, 4, 6, 3), "torchvision resnet50-0676ba61.pth"),
    "resnet101": _member("bottleneck", (3, 4, 23, 3), "torchvision resnet101-cd907fc2.pth"),
    "resnet152": _member("bottleneck", (3, 8, 36, 3), "torchvision resnet152-f82ba261.pth"),
    "resnext50_32x4d": _member(
        "bottleneck", (3, 4, 6, 3), "torchvision resnext50_32x4d-1a0047aa.pth", 32, 4
    ),
    "wide_resnet50_2": _member(
        "bottleneck", (3, 4, 6, 3), "torchvision wide_resnet50_2-9ba9bcbe.pth", 1, 128
    ),
}
