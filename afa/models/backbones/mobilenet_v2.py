"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381), for small devices, with BatchNorm."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import Member, Options, through

# Expansion factor, output channels, number of blocks, stride of the first block (table 2 of the
# paper).
PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1))  # fmt: skip
FIRST, LAST = 32, 1280  # channels of the first and of the last convolution
UPPER = 14  # index in `features` of the block with the stride from 1/16 to 1/32
END = 18  # index of the last convolution


class InvertedResidual(nn.Module):
    """Inverted residual block: 1x1 expansion, depthwise 3x3, 1x1 projection, and a skip connection
    if the shapes agree."""

    expansion: int
    features: int
    strides: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x d"]:
        def norm(y: Array, name: str) -> Array:
            normed = layers.BatchNorm(dtype=self.dtype, name=name)
            return normed(y, train=train, branch=branch)

        inputs, y = x.shape[-1], x
        expanded, index = inputs * self.expansion, 0
        if self.expansion > 1:
            y = layers.conv(expanded, 1, dtype=self.dtype, name="conv.0.0")(y)
            y, index = nn.relu6(norm(y, "conv.0.1")), 1
        y = layers.conv(
            expanded, 3, self.strides, groups=expanded, dtype=self.dtype, name=f"conv.{index}.0"
        )(y)
        y = nn.relu6(norm(y, f"conv.{index}.1"))
        y = layers.conv(self.features, 1, dtype=self.dtype, name=f"conv.{index + 1}")(y)
        y = norm(y, f"conv.{index + 2}")
        return x + y if self.strides == 1 and inputs == self.features else y


class MobileNetV2(nn.Module):
    """Image -> mid map (1/16 of the side) -> last map (1/32).

    With the small stem, a first convolution without stride, the maps are twice as large.
    """

    options: Options = Options()

    STAGES = (
        r"features\.(0\..*|1)",
        r"features\.[23]",
        r"features\.[456]",
        r"features\.([789]|1[0-3])",
        r"features\.(1[4-7]|18\..*)",
    )

    def setup(self) -> None:
        options = self.options
        self.first = layers.conv(
            FIRST, 3, 1 if options.stem == "small" else 2, dtype=options.dtype, name="features.0.0"
        )
        self.first_norm = layers.BatchNorm(dtype=options.dtype, name="features.0.1")
        plan = [
            (expansion, features, strides if i == 0 else 1)
            for expansion, features, count, strides in PLAN
            for i in range(count)
        ]
        self.blocks = {
            f"{index:02}": options.block(InvertedResidual)(
                *part, options.dtype, name=f"features.{index}"
            )
            for index, part in enumerate(plan, start=1)
        }
        self.last = layers.conv(LAST, 1, dtype=options.dtype, name=f"features.{END}.0")
        self.last_norm = layers.BatchNorm(dtype=options.dtype, name=f"features.{END}.1")
        if options.classes:
            self.classifier = nn.Dense(options.classes, dtype=options.dtype, name="classifier.1")

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised image -> mid map."""
        x = self.first(x.astype(self.options.dtype))
        x = nn.relu6(self.first_norm(x, train=train, branch=branch))
        names = tuple(f"{index:02}" for index in range(1, UPPER))
        return through(self.blocks, names, x, train, branch)

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b v u d"]:
        """Mid map -> last map."""
        names = tuple(f"{index:02}" for index in range(UPPER, END))
        x = self.last(through(self.blocks, names, mid, train, branch))
        return nn.relu6(self.last_norm(x, train=train, branch=branch))

    def logits(self, last: Float[Array, "b v u d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network (without its dropout)."""
        return self.classifier(last.mean((1, 2)))


MEMBERS = {
    "mobilenet_v2": Member(
        MobileNetV2, "torchvision mobilenet_v2-b0353104.pth", stems=("imagenet", "small")
    )
}
