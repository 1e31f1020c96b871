"""DenseNet-121/161/169/201 (Huang et al. 2017, arXiv:1608.06993)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import Member, Options


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1; BatchNorm, ReLU, 3x3; concatenated with the input."""

    growth: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b h w d"]:
        y = x
        for i, (features, kernel) in enumerate(((4 * self.growth, 1), (self.growth, 3)), start=1):
            norm = layers.BatchNorm(dtype=self.dtype, name=f"norm{i}")
            y = nn.relu(norm(y, train=train, branch=branch))
            y = layers.conv(features, kernel, dtype=self.dtype, name=f"conv{i}")(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 to half of the channels, 2x2 average pooling."""

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x d"]:
        norm = layers.BatchNorm(dtype=self.dtype, name="norm")
        x = nn.relu(norm(x, train=train, branch=branch))
        x = layers.conv(x.shape[-1] // 2, 1, dtype=self.dtype, name="conv")(x)
        return layers.avg_pool(x, 2, 2)


class DenseNet(nn.Module):
    """Image -> mid map (third dense block, 1/16 of the side) -> last map (1/32).

    With the small stem, a 3x3 convolution without pooling, the maps are four times as large.
    """

    growth: int
    depths: tuple[int, ...]
    width: int
    options: Options = Options()

    STAGES = (
        r"features\.(conv0|norm0)",
        *(rf"features\.(denseblock{i}|transition{i}).*" for i in (1, 2, 3)),
        r"features\.(denseblock4.*|norm5)",
    )

    def setup(self) -> None:
        options, dtype = self.options, self.options.dtype
        kernel, strides = (7, 2) if options.stem == "imagenet" else (3, 1)
        self.conv0 = layers.conv(self.width, kernel, strides, dtype=dtype, name="features.conv0")
        self.norm0 = layers.BatchNorm(dtype=dtype, name="features.norm0")
        self.blocks = [
            [
                options.block(DenseLayer)(
                    self.growth, dtype, name=f"features.denseblock{block}.denselayer{layer}"
                )
                for layer in range(1, depth + 1)
            ]
            for block, depth in enumerate(self.depths, start=1)
        ]
        self.transitions = [
            options.block(Transition)(dtype, name=f"features.transition{i}")
            for i in range(1, len(self.depths))
        ]
        self.norm5 = layers.BatchNorm(dtype=dtype, name="features.norm5")
        if options.classes:
            self.classifier = nn.Dense(options.classes, dtype=dtype)

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised image -> mid map."""
        x = self.conv0(x.astype(self.options.dtype))
        x = nn.relu(self.norm0(x, train=train, branch=branch))
        if self.options.stem == "imagenet":
            x = layers.max_pool(x)
        for i, block in enumerate(self.blocks[:-1]):
            x = self.transitions[i - 1](x, train, branch) if i else x
            for layer in block:
                x = layer(x, train, branch)
        return x

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b v u d"]:
        """Mid map -> last map."""
        x = self.transitions[-1](mid, train, branch)
        for layer in self.blocks[-1]:
            x = layer(x, train, branch)
        return nn.relu(self.norm5(x, train=train, branch=branch))

    def logits(self, last: Float[Array, "b v u d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network."""
        return self.classifier(last.mean((1, 2)))


def _member(growth: int, depths: tuple[int, ...], width: int, source: str) -> Member:
    def build(options: Options) -> DenseNet:
        return DenseNet(growth, depths, width, options)

    return Member(build, f"torchvision {source}.pth", stems=("imagenet", "small"))


MEMBERS = {
    "densenet121": _member(32, (6, 12, 24, 16), 64, "densenet121-a639ec97"),
    "densenet161": _member(48, (6, 12, 36, 24), 96, "densenet161-8d451a50"),
    "densenet169": _member(32, (6, 12, 32, 32), 64, "densenet169-b2777c0a"),
    "densenet201": _member(32, (6, 12, 48, 32), 64, "densenet201-c1103571"),
}
