"""Types shared by all families of backbones."""

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
    """Options of building a member.

    Attributes:
      stem: "imagenet", or "small" for images up to 48 pixels.
      dtype: compute type; parameters are float32.
      remat: rematerialise activations inside blocks in the backward pass, to save memory.
      classes: outputs of the published classifier; 0 for none.
    """

    stem: Stem = "imagenet"
    dtype: layers.Dtype = jnp.float32
    remat: bool = False
    classes: int = 0

    def block(self, module: Any) -> Any:
        """Wraps a module class, called as `block(x, train, branch)`, in `nn.remat` if `remat`."""
        return nn.remat(module, static_argnums=(2, 3)) if self.remat else module


def through(
    blocks: Mapping[str, Any],
    prefix: str | tuple[str, ...],
    x: Float[Array, "b h w c"],
    train: bool,
    branch: layers.Branch,
) -> Float[Array, "b y x d"]:
    """Applies the blocks whose names start with `prefix`, in order."""
    for name, block in blocks.items():
        x = block(x, train, branch) if name.startswith(prefix) else x
    return x


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation of an image in [0, 1]: (image[channels] - mean) / std.

    Attributes:
      mean, std: one value per channel, in the order of `channels`.
      channels: "rgb", or "bgr" for networks from Caffe.
      crop: fraction of the shorter side kept by the authors' evaluation; recorded, not used.
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
      source: source of the published weights.
      licence: licence of the published weights.
      preprocessing: preprocessing of the published weights.
      input_size: image size of the published training, in pixels.
      smallest: smallest image size, in pixels.
      multiple: the image size must be a multiple of this.
      stems: allowed values of `Options.stem`.
      ignored: regular expression of keys in published files that the network does not use, such as
        auxiliary classifiers.
    """

    build: Callable[[Options], Any]
    source: str
    licence: str = BSD
    preprocessing: Preprocessing = IMAGENET
    input_size: int = 224
    smallest: int = 16
    multiple: int = 1
    stems: tuple[Stem, ...] = ("imagenet",)
    ignored: str = r"(?!)"
