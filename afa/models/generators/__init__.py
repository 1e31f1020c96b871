"""Generators: one file each, and one line of `GENERATORS`.

A generator is a module with the methods

    restore(images) -> images                  imperfect images -> clean images
    sample(z) -> images                        noise or codes -> images
    encode(images) -> (mean, log_variance)     code z of an image, a normal distribution
    __call__(images, z)                        runs all of them; initialises every parameter

Images lie in [0, 1], z has `generator.latent_dim` numbers. An untrained generator restores every
image to itself.
"""

from collections.abc import Callable

import flax.linen as nn

from afa.config import GeneratorConfig
from afa.errors import choose
from afa.models import layers
from afa.models.generators import residual

# name -> module of (settings, side of an image, compute type)
GENERATORS: dict[str, Callable[[GeneratorConfig, int, layers.Dtype], nn.Module]] = {
    "residual": residual.build,
}


def build(config: GeneratorConfig, image_size: int, dtype: layers.Dtype) -> nn.Module:
    """Builds the generator `generator.name`.

    Raises:
      UserError: the name is unknown.
    """
    return choose("generator.name", config.name, GENERATORS)(config, image_size, dtype)
