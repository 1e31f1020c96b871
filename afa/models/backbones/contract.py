"""What every family of backbones agrees on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers

Stem = Literal["imagenet", "small"]

BSD = "BSD-3-Clause"
APACHE = "Apache-2.0"


@dataclass(frozen=True)
class Options:
    """How a member is built.

    Attributes:
      stem: "imagenet", or "small" for images up to 48 pixels.
      dtype: compute type; parameters are float32.
      remat: compute the maps inside a block again in the backward pass instead of keeping them.
      classes: outputs of the original classifier; 0 leaves it out.
    """

    stem: Stem = "imagenet"
    dtype: layers.Dtype = jnp.float32
    remat: bool = False
    classes: int = 0

    def block(self, module: Any) -> Any:
        """The class of a block called as `block(x, train, branch)`, rematerialised if asked for."""
        return nn.remat(module, static_argnums=(2, 3)) if self.remat else module


def through(
    blocks: Mapping[str, Any],
    begin: str | tuple[str, ...],
    x: Float[Array, "b h w c"],
    train: bool,
    branch: layers.Branch,
) -> Float[Array, "b y x d"]:
    """A map through the blocks whose names begin so, in their order."""
    for name, block in blocks.items():
        x = block(x, train, branch) if name.startswith(begin) else x
    return x


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of an image in [0, 1]: (image[channels] - mean) / std.

    Attributes:
      mean, std: one figure a channel, in the order of `channels`.
      channels: "rgb", or "bgr" for networks from Caffe.
      crop: share of the shorter side that its makers' evaluation keeps; for the record.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: Literal["rgb", "bgr"] = "rgb"
    crop: float = 0.875


IMAGENET = Preprocessing()
HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Member:
    """One network of a family.

    Attributes:
      build: options -> linen module.
      source: where its published weights come from.
      licence: of those weights.
      preprocessing: of those weights.
      input_size: side of the images they were trained on.
      smallest: side of the smallest images it can take.
      multiple: what the side has to be a multiple of.
      stems: what `Options.stem` may be.
      aside: regular expression of the parameters in published files that the network does without,
        such as auxiliary classifiers.
    """

    build: Callable[[Options], Any]
    source: str
    licence: str = BSD
    preprocessing: Preprocessing = IMAGENET
    input_size: int = 224
    smallest: int = 16
    multiple: int = 1
    stems: tuple[Stem, ...] = ("imagenet",)
    aside: str = r"(?!)"
