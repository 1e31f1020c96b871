"""GoogLeNet, the first Inception network (Szegedy et al. 2015, arXiv:1409.4842), with BatchNorm and
3x3 instead of 5x5 convolutions, as in torchvision."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import HALF, Member, Options, through
from afa.models.layers import ConvNorm

# Channels of the four branches: 1x1; 1x1 and 3x3; 1x1 and 3x3; pooling and 1x1.
PLANS = {
    "inception3a": (64, (96, 128), (16, 32), 32),
    "inception3b": (128, (128, 192), (32, 96), 64),
    "inception4a": (192, (96, 208), (16, 48), 64),
    "inception4b": (160, (112, 224), (24, 64), 64),
    "inception4c": (128, (128, 256), (24, 64), 64),
    "inception4d": (112, (144, 288), (32, 64), 64),
    "inception4e": (256, (160, 320), (32, 128), 128),
    "inception5a": (256, (160, 320), (32, 128), 128),
    "inception5b": (384, (192, 384), (48, 128), 128),
}


class Inception(nn.Module):
    """Inception block: four parallel branches, concatenated."""

    plan: tuple[int, tuple[int, int], tuple[int, int], int]
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b h w d"]:
        def conv_norm(x: Array, features: int, kernel: int, name: str) -> Array:
            return ConvNorm(features, kernel, dtype=self.dtype, name=name)(x, train, branch)

        one, *pairs, pooled = self.plan
        outputs = [conv_norm(x, one, 1, "branch1")]
        for i, (reduced, features) in enumerate(pairs, start=2):
            y = conv_norm(x, reduced, 1, f"branch{i}.0")
            outputs.append(conv_norm(y, features, 3, f"branch{i}.1"))
        outputs.append(conv_norm(layers.max_pool(x, 3, 1, 1), pooled, 1, "branch4.1"))
        return jnp.concatenate(outputs, axis=-1)


class GoogLeNet(nn.Module):
    """Image -> mid map (4e, 1/16 of the side) -> last map (5b, 1/32)."""

    options: Options = Options()

    STAGES = (
        r"conv1", r"conv2|conv3", r"inception3.*", r"inception4.*", r"inception5.*",
    )  # fmt: skip

    def setup(self) -> None:
        options = self.options
        self.conv1 = ConvNorm(64, 7, 2, dtype=options.dtype)
        self.conv2 = ConvNorm(64, 1, dtype=options.dtype)
        self.conv3 = ConvNorm(192, 3, dtype=options.dtype)
        self.blocks = {
            name: options.block(Inception)(plan, options.dtype, name=name)
            for name, plan in PLANS.items()
        }
        if options.classes:
            self.fc = nn.Dense(options.classes, dtype=options.dtype)

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised image -> mid map."""
        x = self.conv1(x.astype(self.options.dtype), train, branch)
        x = layers.max_pool(x, 3, 2, 0, ceil=True)
        x = self.conv3(self.conv2(x, train, branch), train, branch)
        for stage in ("inception3", "inception4"):
            x = layers.max_pool(x, 3, 2, 0, ceil=True)
            x = through(self.blocks, stage, x, train, branch)
        return x

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b v u d"]:
        """Mid map -> last map."""
        x = layers.max_pool(mid, 2, 2, 0, ceil=True)
        return through(self.blocks, "inception5", x, train, branch)

    def logits(self, last: Float[Array, "b v u d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network (without its dropout)."""
        return self.fc(last.mean((1, 2)))


MEMBERS = {
    "googlenet": Member(
        GoogLeNet,
        "torchvision googlenet-1378be20.pth",
        preprocessing=HALF,  # equivalent to its `transform_input`
        ignored=r"aux[12]\..*",
    )
}
