"""BN-Inception (Ioffe & Szegedy 2015, arXiv:1502.03167), the usual backbone of metric learning.

Names and arithmetic follow the Caffe network that `pretrainedmodels` and the metric learning
papers use: convolutions with bias, BGR images from 0 to 255, not divided by a standard deviation.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import Member, Options, Preprocessing

# Channels of the branches: 1x1; 1x1 and 3x3; 1x1 and two 3x3; pooling ("avg" or "max") and 1x1.
# A block without the first branch halves the map: its last 3x3 convolutions have stride 2, and its
# pooling has no convolution.
PLANS = {
    "3a": (64, (64, 64), (64, 96), ("avg", 32)),
    "3b": (64, (64, 96), (64, 96), ("avg", 64)),
    "3c": (0, (128, 160), (64, 96), ("max", 0)),
    "4a": (224, (64, 96), (96, 128), ("avg", 128)),
    "4b": (192, (96, 128), (96, 128), ("avg", 128)),
    "4c": (160, (128, 160), (128, 160), ("avg", 128)),
    "4d": (96, (128, 192), (160, 192), ("avg", 128)),
    "4e": (0, (128, 192), (192, 256), ("max", 0)),
    "5a": (352, (192, 320), (160, 224), ("avg", 128)),
    "5b": (352, (192, 320), (192, 224), ("max", 128)),
}
STEM = {"conv1_7x7_s2": (64, 7, 2), "conv2_3x3_reduce": (64, 1, 1), "conv2_3x3": (192, 3, 1)}
Chain = list[
    tuple[str, int, int, int]
]  # name, channels, kernel, stride of consecutive convolutions


def _branches(block: str) -> list[tuple[str, Chain]]:
    """Returns the branches of a block: initial pooling ("avg", "max" or "") and convolutions."""
    one, single, double, (pool, projected) = PLANS[block]
    strides = 1 if one else 2
    found: list[tuple[str, Chain]] = [("", [("1x1", one, 1, 1)])] if one else []
    found += [
        ("", [("3x3_reduce", single[0], 1, 1), ("3x3", single[1], 3, strides)]),
        ("", [("double_3x3_reduce", double[0], 1, 1), ("double_3x3_1", double[1], 3, 1),
              ("double_3x3_2", double[1], 3, strides)]),
        (pool, [("pool_proj", projected, 1, 1)] if projected else []),
    ]  # fmt: skip
    return [
        (kind, [(f"inception_{block}_{name}", *rest) for name, *rest in chain])
        for kind, chain in found
    ]  # pyright: ignore[reportReturnType]


class BNInception(nn.Module):
    """Image -> mid map (4d, 1/16 of the side) -> last map (5b, 1/32).

    A single flat module, because the published names are flat.
    """

    options: Options = Options()

    STAGES = (
        r"conv1_7x7_s2.*", r"conv2_.*", r"inception_3.*", r"inception_4[a-d].*",
        r"inception_(4e|5).*",
    )  # fmt: skip

    def setup(self) -> None:
        dtype = self.options.dtype
        shapes = dict(STEM)
        for block in PLANS:
            for _, chain in _branches(block):
                shapes |= {name: (features, k, strides) for name, features, k, strides in chain}
        self.convs = {
            name: layers.conv(*shape, use_bias=True, dtype=dtype, name=name)
            for name, shape in shapes.items()
        }
        self.norms = {name: layers.BatchNorm(dtype=dtype, name=f"{name}_bn") for name in shapes}
        if self.options.classes:
            self.last_linear = nn.Dense(self.options.classes, dtype=dtype)

    def _conv_norm(self, x: Array, name: str, train: bool, branch: layers.Branch) -> Array:
        return nn.relu(self.norms[name](self.convs[name](x), train=train, branch=branch))

    def _block(self, x: Array, block: str, train: bool, branch: layers.Branch) -> Array:
        halving = not PLANS[block][0]
        outputs = []
        for kind, chain in _branches(block):
            y = x
            if kind == "avg":
                y = layers.avg_pool(x, 3, 1, 1)
            elif kind == "max":
                y = layers.max_pool(x, 3, 2, 0, ceil=True) if halving else layers.max_pool(x, 3, 1)
            for name, *_ in chain:
                y = self._conv_norm(y, name, train, branch)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1)

    def _blocks(self, x: Array, blocks: str, train: bool, branch: layers.Branch) -> Array:
        for block in blocks.split():

            def run(module: "BNInception", x: Array, block: str = block) -> Array:
                return module._block(x, block, train, branch)

            x = (nn.remat(run) if self.options.remat else run)(self, x)
        return x

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised image -> mid map."""
        x = self._conv_norm(x.astype(self.options.dtype), "conv1_7x7_s2", train, branch)
        x = layers.max_pool(x, 3, 2, 0, ceil=True)
        for name in ("conv2_3x3_reduce", "conv2_3x3"):
            x = self._conv_norm(x, name, train, branch)
        x = layers.max_pool(x, 3, 2, 0, ceil=True)
        return self._blocks(x, "3a 3b 3c 4a 4b 4c 4d", train, branch)

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b v u d"]:
        """Mid map -> last map."""
        return self._blocks(mid, "4e 5a 5b", train, branch)

    def logits(self, last: Float[Array, "b v u d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network."""
        return self.last_linear(last.mean((1, 2)))


MEMBERS = {
    "bn_inception": Member(
        BNInception,
        "pretrainedmodels bn_inception-52deb4733.pth",
        preprocessing=Preprocessing(
            (104 / 255, 117 / 255, 128 / 255), (1 / 255, 1 / 255, 1 / 255), "bgr"
        ),
        multiple=32,  # otherwise convolutions and pooling round odd sizes differently
    )
}
