"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): for small devices, with normalisation."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import Member, Options, through

# Factor by which a block widens its input, its output channels, number of blocks, first stride
# (table 2 of the paper).
PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1))  # fmt: skip
FIRST, LAST = 32, 1280  # channels of the first and of the last convolution
UPPER = 14  # place in `features` of the block that makes 1/32 of the side of 1/16
END = 18  # place of the last convolution


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 of every channel by itself, 1x1 to few; added to the input where
    that has the same shape."""

    widen: int
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

        inside, y = x.shape[-1], x
        wide, place = inside * self.widen, 0
        if self.widen > 1:
            y = layers.conv(wide, 1, dtype=self.dtype, name="conv.0.0")(y)
            y, place = nn.relu6(norm(y, "conv.0.1")), 1
        y = layers.conv(
            wide, 3, self.strides, groups=wide, dtype=self.dtype, name=f"conv.{place}.0"
        )(y)
        y = nn.relu6(norm(y, f"conv.{place}.1"))
        y = layers.conv(self.features, 1, dtype=self.dtype, name=f"conv.{place + 1}")(y)
        y = norm(y, f"conv.{place + 2}")
        return x + y if self.strides == 1 and inside == self.features else y


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
            (widen, features, strides if i == 0 else 1)
            for widen, features, count, strides in PLAN
            for i in range(count)
        ]
        self.blocks = {
            f"{place:02}": options.block(InvertedResidual)(
                *part, options.dtype, name=f"features.{place}"
            )
            for place, part in enumerate(plan, start=1)
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
        places = tuple(f"{place:02}" for place in range(1, UPPER))
        return through(self.blocks, places, x, train, branch)

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b v u d"]:
        """Mid map -> last map."""
        places = tuple(f"{place:02}" for place in range(UPPER, END))
        x = self.last(through(self.blocks, places, mid, train, branch))
        return nn.relu6(self.last_norm(x, train=train, branch=branch))

    def logits(self, last: Float[Array, "b v u d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network (without its dropout)."""
        return self.classifier(last.mean((1, 2)))


MEMBERS = {
    "mobilenet_v2": Member(
        MobileNetV2, "torchvision mobilenet_v2-b0353104.pth", stems=("imagenet", "small")
    )
}
