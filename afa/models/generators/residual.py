"""A residual generator: restores the whole image."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.config import GeneratorConfig
from afa.models import layers
from afa.models.generators.codes import Codes
from afa.models.spaces import Shape
from afa.models.unet import UNet, clip_unit

Image = Float[Array, "b h w 3"]
Damage = Float[Array, "b h w"]  # 0: intact, 1: to be replaced


class Generator(nn.Module):
    """`restore(x)`: clip(x + R(x)) with a U-Net R; an untrained generator is the identity.
    `sample` and `encode`: `Codes`. Images lie in [0, 1], in and out."""

    width: int
    levels: int
    blocks: int
    latent_dim: int
    image_size: int
    dtype: layers.Dtype = jnp.float32

    def setup(self) -> None:
        self.change = UNet(self.width, self.levels, self.blocks, 3, self.dtype)
        self.codes = Codes(self.width // 2, self.latent_dim, self.image_size, self.dtype)

    def restore(self, images: Image, damage: Damage) -> Image:
        """Imperfect images -> clean images x^; the damage is not used."""
        return clip_unit(images + self.change(2 * images - 1))

    def encode(self, images: Image) -> tuple[Float[Array, "b z"], Float[Array, "b z"]]:
        """Images -> mean and logarithm of the variance of their codes."""
        return self.codes.encode(images)

    def sample(self, z: Float[Array, "b z"]) -> Image:
        """Noise, or codes -> images."""
        return self.codes.sample(z)

    def __call__(self, images: Image, z: Float[Array, "b z"]) -> tuple[Image, Image]:
        """All modes at once; initialises every parameter."""
        self.encode(images)
        return self.restore(images, jnp.zeros(images.shape[:-1])), self.sample(z)


def build(config: GeneratorConfig, shape: Shape, dtype: layers.Dtype) -> Generator:
    """Builds the generator from its settings."""
    return Generator(config.width, config.levels, config.blocks, config.latent_dim, shape[0], dtype)
