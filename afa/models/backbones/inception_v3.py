"""Inception v3 (Szegedy et al. 2016, arXiv:1512.00567), as in torchvision."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import HALF, Member, Options, through
from afa.models.layers import ConvNorm

Shape = tuple[int, int | tuple[int, int], int, int | None]  # channels, kernel, stride, padding
Chain = tuple[tuple[str, Shape], ...]  # consecutive convolutions, by name


def _one(features: int) -> Shape:
    return features, 1, 1, None


def _keep(features: int, kernel: int | tuple[int, int]) -> Shape:
    return features, kernel, 1, None


def _halve(features: int) -> Shape:
    return features, 3, 2, 0


ROW, COLUMN = (1, 7), (7, 1)


def _a(pooled: int) -> dict[str, Chain]:
    """35x35 block: 1x1, 5x5, double 3x3, pooling."""
    return {
        "": (("branch1x1", _one(64)),),
        "5x5": (("branch5x5_1", _one(48)), ("branch5x5_2", _keep(64, 5))),
        "3x3": (("branch3x3dbl_1", _one(64)), ("branch3x3dbl_2", _keep(96, 3)),
                ("branch3x3dbl_3", _keep(96, 3))),
        "avg": (("branch_pool", _one(pooled)),),
    }  # fmt: skip


def _c(width: int) -> dict[str, Chain]:
    """17x17 block: 7x7 convolutions factorised into 1x7 and 7x1."""
    return {
        "": (("branch1x1", _one(192)),),
        "7x7": (("branch7x7_1", _one(width)), ("branch7x7_2", _keep(width, ROW)),
                ("branch7x7_3", _keep(192, COLUMN))),
        "double": (("branch7x7dbl_1", _one(width)), ("branch7x7dbl_2", _keep(width, COLUMN)),
                   ("branch7x7dbl_3", _keep(width, ROW)),
                   ("branch7x7dbl_4", _keep(width, COLUMN)),
                   ("branch7x7dbl_5", _keep(192, ROW))),
        "avg": (("branch_pool", _one(192)),),
    }  # fmt: skip


_E: dict[str, Chain] = {
    "": (("branch1x1", _one(320)),),
    "3x3": (("branch3x3_1", _one(384)), ("branch3x3_2a+b", _keep(384, 3))),
    "double": (("branch3x3dbl_1", _one(448)), ("branch3x3dbl_2", _keep(384, 3)),
               ("branch3x3dbl_3a+b", _keep(384, 3))),
    "avg": (("branch_pool", _one(192)),),
}  # fmt: skip

# Block -> branches. "avg" and "max" start with pooling. A convolution "...a+b" is a parallel
# pair, 1x3 and 3x1.
PLANS: dict[str, dict[str, Chain]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": {
        "": (("branch3x3", _halve(384)),),
        "3x3": (("branch3x3dbl_1", _one(64)), ("branch3x3dbl_2", _keep(96, 3)),
                ("branch3x3dbl_3", _halve(96))),
        "max": (),
    },
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": {
        "3x3": (("branch3x3_1", _one(192)), ("branch3x3_2", _halve(320))),
        "7x7": (("branch7x7x3_1", _one(192)), ("branch7x7x3_2", _keep(192, ROW)),
                ("branch7x7x3_3", _keep(192, COLUMN)), ("branch7x7x3_4", _halve(192))),
        "max": (),
    },
    "Mixed_7b": _E,
    "Mixed_7c": _E,
}  # fmt: skip
POOLS: dict[str, Callable[[Array], Array]] = {
    "avg": lambda x: layers.avg_pool(x, 3, 1, 1),
    "max": lambda x: layers.max_pool(x, 3, 2, 0),
}


class Mixed(nn.Module):
    """Inception block: parallel branches, concatenated."""

    plan: Mapping[str, Chain]
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x d"]:
        def conv_norm(x: Array, name: str, shape: Shape) -> Array:
            return ConvNorm(*shape, dtype=self.dtype, name=name)(x, train, branch)

        outputs = []
        for kind, chain in self.plan.items():
            y = POOLS[kind](x) if kind in POOLS else x
            for name, shape in chain:
                if name.endswith("a+b"):
                    stem = name.removesuffix("a+b")
                    pair = {"a": (1, 3), "b": (3, 1)}
                    y = jnp.concatenate(
                        [conv_norm(y, stem + end, _keep(shape[0], k)) for end, k in pair.items()],
                        -1,
                    )
                else:
                    y = conv_norm(y, name, shape)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1)


STEM: dict[str, Shape] = {
    "Conv2d_1a_3x3": (32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 3, 1, 0),
    "Conv2d_2b_3x3": (64, 3, 1, 1),
    "Conv2d_3b_1x1": (80, 1, 1, 0),
    "Conv2d_4a_3x3": (192, 3, 1, 0),
}
POOLED = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")  # followed by pooling


class InceptionV3(nn.Module):
    """Image -> mid map (6e, about 1/16 of the side) -> last map (7c, about 1/32).

    The stem and the halving layers have no padding, so the smallest image size is 75 pixels.
    """

    options: Options = Options()

    STAGES = (r"Conv2d_[12].*", r"Conv2d_[34].*", r"Mixed_5.*", r"Mixed_6.*", r"Mixed_7.*")

    def setup(self) -> None:
        options = self.options
        self.stem = {
            name: ConvNorm(*shape, dtype=options.dtype, name=name) for name, shape in STEM.items()
        }
        self.blocks = {
            name: options.block(Mixed)(plan, options.dtype, name=name)
            for name, plan in PLANS.items()
        }
        if options.classes:
            self.fc = nn.Dense(options.classes, dtype=options.dtype)

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised image -> mid map."""
        x = x.astype(self.options.dtype)
        for name, conv_norm in self.stem.items():
            x = conv_norm(x, train, branch)
            x = layers.max_pool(x, 3, 2, 0) if name in POOLED else x
        return through(self.blocks, ("Mixed_5", "Mixed_6"), x, train, branch)

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b v u d"]:
        """Mid map -> last map."""
        return through(self.blocks, "Mixed_7", mid, train, branch)

    def logits(self, last: Float[Array, "b v u d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network (without its dropout)."""
        return self.fc(last.mean((1, 2)))


MEMBERS = {
    "inception_v3": Member(
        InceptionV3,
        "torchvision inception_v3_google-0cc3c7bd.pth",
        preprocessing=HALF,  # equivalent to its `transform_input`
        input_size=299,
        smallest=75,
        ignored=r"AuxLogits\..*",
    )
}
