"""VGG-11/13/16/19 (Simonyan & Zisserman 2015, arXiv:1409.1556), with and without BatchNorm."""

import flax.linen as nn
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import Member, Options

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Image -> mid map (after the fourth pooling, 1/16 of the side) -> last map (the fifth stage
    before its pooling, 1/16, as usual in retrieval since Babenko & Lempitsky 2015)."""

    depths: tuple[int, ...]
    norm: bool
    options: Options = Options()

    # The indices in `features` of the stages differ between members.
    @property
    def STAGES(self) -> tuple[str, ...]:
        return tuple(rf"features\.({'|'.join(map(str, stage))})" for stage in self._indices())

    def _indices(self) -> list[list[int]]:
        """Returns the indices in `features` of convolutions and BatchNorms, per stage."""
        start, stages = 0, []
        for depth in self.depths:
            step = 3 if self.norm else 2  # convolution, BatchNorm if `norm`, ReLU
            stages.append([start + i * step + j for i in range(depth) for j in range(step - 1)])
            start += depth * step + 1  # and the pooling
        return stages

    def setup(self) -> None:
        dtype, modules = self.options.dtype, []
        for width, indices in zip(WIDTHS, self._indices(), strict=True):
            stage = []
            for index in indices[:: 2 if self.norm else 1]:
                stage.append(
                    layers.conv(width, 3, use_bias=True, dtype=dtype, name=f"features.{index}")
                )
                if self.norm:
                    stage.append(layers.BatchNorm(dtype=dtype, name=f"features.{index + 1}"))
            modules.append(stage)
        self.modules = modules
        if self.options.classes:
            sizes = {0: 4096, 3: 4096, 6: self.options.classes}
            self.dense = [
                nn.Dense(n, dtype=dtype, name=f"classifier.{i}") for i, n in sizes.items()
            ]

    def _stage(
        self, x: Float[Array, "b h w c"], stage: int, train: bool, branch: layers.Branch
    ) -> Float[Array, "b h w d"]:
        modules = iter(self.modules[stage])
        for conv in modules:
            x = conv(x)
            x = nn.relu(next(modules)(x, train=train, branch=branch) if self.norm else x)
        return x

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised image -> mid map."""
        x = x.astype(self.options.dtype)
        for stage in range(4):
            x = layers.max_pool(self._stage(x, stage, train, branch), 2, 2, 0)
        return x

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x d"]:
        """Mid map -> last map."""
        return self._stage(mid, 4, train, branch)

    def logits(self, last: Float[Array, "b y x d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network (without its dropout)."""
        x = layers.adaptive_avg_pool(layers.max_pool(last, 2, 2, 0), 7)
        # Channels first, to match the order of the published weights.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for dense in self.dense[:-1]:
            x = nn.relu(dense(x))
        return self.dense[-1](x)


def _member(depths: tuple[int, ...], norm: bool, source: str) -> Member:
    return Member(lambda options: VGG(depths, norm, options), f"torchvision {source}.pth")


MEMBERS = {
    "vgg11": _member((1, 1, 2, 2, 2), False, "vgg11-8a719046"),
    "vgg13": _member((2, 2, 2, 2, 2), False, "vgg13-19584684"),
    "vgg16": _member((2, 2, 3, 3, 3), False, "vgg16-397923af"),
    "vgg19": _member((2, 2, 4, 4, 4), False, "vgg19-dcbb9e9d"),
    "vgg11_bn": _member((1, 1, 2, 2, 2), True, "vgg11_bn-6002323d"),
    "vgg13_bn": _member((2, 2, 2, 2, 2), True, "vgg13_bn-abd245e5"),
    "vgg16_bn": _member((2, 2, 3, 3, 3), True, "vgg16_bn-6c64b313"),
    "vgg19_bn": _member((2, 2, 4, 4, 4), True, "vgg19_bn-c79401a0"),
}
