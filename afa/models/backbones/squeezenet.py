"""SqueezeNet 1.0 and 1.1 (Iandola et al. 2016, arXiv:1602.07360), for small devices."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import Member, Options

PLANS = {  # after the first convolution: "pool", or (squeezed, expanded) channels
    "1.0": ("pool", (16, 64), (16, 64), (32, 128), "pool", (32, 128), (48, 192), (48, 192),
            (64, 256), "pool", (64, 256)),
    "1.1": ("pool", (16, 64), (16, 64), "pool", (32, 128), (32, 128), "pool", (48, 192), (48, 192),
            (64, 256), (64, 256)),
}  # fmt: skip
FIRST = {"1.0": (96, 7), "1.1": (64, 3)}  # channels and kernel of the first convolution
OFFSET = 2  # index in `features` of the first entry of the plan, after convolution and ReLU


class Fire(nn.Module):
    """Fire module: 1x1 squeeze, then parallel 1x1 and 3x3 expansion, concatenated."""

    squeezed: int
    expanded: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b h w d"]:
        def conv(features: int, kernel: int, name: str) -> nn.Conv:
            return layers.conv(features, kernel, use_bias=True, dtype=self.dtype, name=name)

        x = nn.relu(conv(self.squeezed, 1, "squeeze")(x))
        outputs = [conv(self.expanded, k, f"expand{k}x{k}")(x) for k in (1, 3)]
        return nn.relu(jnp.concatenate(outputs, axis=-1))


class SqueezeNet(nn.Module):
    """Image -> mid map (the last map at 1/8 of the side) -> last map (1/16).

    The upper part starts with the last pooling. Without normalisation layers the clean and the
    adversarial branch are the same function.
    """

    version: str
    options: Options = Options()

    @property
    def STAGES(self) -> tuple[str, ...]:
        stages, names = [], [r"features\.0"]
        for index, part in enumerate(PLANS[self.version], start=OFFSET):
            if part == "pool":
                stages.append("|".join(names))
                names = []
            else:
                names.append(rf"features\.{index}")
        return (*stages, "|".join(names))

    def setup(self) -> None:
        options = self.options
        width, kernel = FIRST[self.version]
        small = options.stem == "small"
        self.first = layers.conv(
            width, 3 if small else kernel, 1 if small else 2, padding=1 if small else 0,
            use_bias=True, dtype=options.dtype, name="features.0",
        )  # fmt: skip
        self.fires = {
            f"{index}": options.block(Fire)(*part, options.dtype, name=f"features.{index}")
            for index, part in enumerate(PLANS[self.version], start=OFFSET)
            if part != "pool"
        }
        if options.classes:
            self.classifier = layers.conv(
                options.classes, 1, use_bias=True, dtype=options.dtype, name="classifier.1"
            )

    def _run(
        self, x: Float[Array, "b h w c"], indices: range, train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x d"]:
        for index in indices:
            if PLANS[self.version][index - OFFSET] == "pool":
                x = layers.max_pool(x, 3, 2, 0, ceil=True)
            else:
                x = self.fires[f"{index}"](x, train, branch)
        return x

    @property
    def _last_pool(self) -> int:
        plan = PLANS[self.version]
        return OFFSET + max(i for i, part in enumerate(plan) if part == "pool")

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b y x c"]:
        """Standardised image -> mid map."""
        x = nn.relu(self.first(x.astype(self.options.dtype)))
        return self._run(x, range(OFFSET, self._last_pool), train, branch)

    def upper(
        self, mid: Float[Array, "b y x c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b v u d"]:
        """Mid map -> last map."""
        end = OFFSET + len(PLANS[self.version])
        return self._run(mid, range(self._last_pool, end), train, branch)

    def logits(self, last: Float[Array, "b v u d"]) -> Float[Array, "b classes"]:
        """Last map -> scores of the classes of the published network (without its dropout)."""
        return nn.relu(self.classifier(last)).mean((1, 2))


MEMBERS = {
    f"squeezenet{version.replace('.', '_')}": Member(
        lambda options, version=version: SqueezeNet(version, options),
        f"torchvision squeezenet{version.replace('.', '_')}-{digest}.pth",
        stems=("imagenet", "small"),
    )
    for version, digest in (("1.0", "b66bff10"), ("1.1", "b8a52dc0"))
}
