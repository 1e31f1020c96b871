"""Generators: one file each, and one line of `GENERATORS`.

A generator is a module with the methods

    restore(x, damage) -> x^              imperfect x -> clean x^
    sample(z) -> x                        noise or codes -> x
    encode(x) -> (mean, log_variance)     code z of x, a normal distribution
    __call__(x, z)                        runs all of them; initialises every parameter

x are images in [0, 1], or mid maps of F: the generator's space (`afa.models.spaces`). damage has a
number in [0, 1] for every position of x, 1 where x is to be replaced: D's estimate for the
generators of `LOCALISED`, and 0 for the others. z has `generator.latent_dim` numbers. Without
damage, an untrained generator restores every x to itself.
"""

from collections.abc import Callable

import flax.linen as nn

from afa.config import GeneratorConfig
from afa.errors import choose
from afa.models import layers
from afa.models.embedder import Embedder
from afa.models.generators import features, inpainting, residual
from afa.models.spaces import IMAGES, MID_MAPS, Shape, Space

Build = Callable[[GeneratorConfig, Shape, layers.Dtype], nn.Module]

# name -> its space, and the module of (settings, shape of x, compute type)
GENERATORS: dict[str, tuple[Space, Build]] = {
    "inpainting": (IMAGES, inpainting.build),
    "filling": (IMAGES, inpainting.build),
    "residual": (IMAGES, residual.build),
    "features": (MID_MAPS, features.build),
}
LOCALISED = ("inpainting", "filling")  # those for which D estimates the damage of every pixel


def build(
    config: GeneratorConfig, embedder: Embedder, image_size: int, dtype: layers.Dtype
) -> tuple[nn.Module, Space]:
    """Builds the generator `generator.name`; returns it and its space.

    Raises:
      UserError: the name is unknown.
    """
    space, make = choose("generator.name", config.name, GENERATORS)
    return make(config, space.shape(embedder, image_size), dtype), space
