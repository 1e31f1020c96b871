"""Images from noise: a decoder of codes, and its encoder (Kingma & Welling 2014)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.unet import pixel_norm

Image = Float[Array, "b h w 3"]
SMALLEST_MAP = 7  # pixels: the decoder begins with a map of at most this side, if it can


class Codes(nn.Module):
    """`sample(z)`: sigmoid(decoder(z)), drawn at half of the resolution and enlarged. `encode(x)`:
    mean and logarithm of the variance of the code z of an image, by which the decoder learns from
    images. Images lie in [0, 1]."""

    width: int  # channels at half of the resolution, doubled with every further halving
    latent_dim: int
    image_size: int
    dtype: layers.Dtype = jnp.float32

    def setup(self) -> None:
        def make(
            features: int, kernel: int, strides: int = 1, padding: int | None = None, **more: Any
        ) -> nn.Conv:
            return layers.conv(
                features, kernel, strides, dtype=self.dtype, padding=padding, use_bias=True, **more
            )

        side, halvings = self.image_size // 2, 1
        while side % 2 == 0 and side > SMALLEST_MAP:
            side, halvings = side // 2, halvings + 1
        self.side = side
        channels = [max(self.width, 1) * min(2**level, 8) for level in range(halvings)]
        self.encoder = [make(each, 4, 2, 1) for each in channels]
        self.code = nn.Dense(2 * self.latent_dim, dtype=self.dtype)
        self.noise = nn.Dense(side**2 * channels[-1], dtype=self.dtype)
        self.decoder = [make(each, 3) for each in reversed(channels[:-1])]
        self.drawn = make(3, 3, kernel_init=nn.initializers.normal(1e-2))

    def encode(self, images: Image) -> tuple[Float[Array, "b z"], Float[Array, "b z"]]:
        """Images -> mean and logarithm of the variance of their codes."""
        x = (2 * images - 1).astype(self.dtype)
        for layer in self.encoder:
            x = layers.leaky_relu(layer(x))
        mean, log_variance = jnp.split(self.code(x.reshape(len(x), -1)).astype(jnp.float32), 2, -1)
        return mean, log_variance

    def sample(self, z: Float[Array, "b z"]) -> Image:
        """Noise, or codes -> images."""
        x = self.noise(z.astype(self.dtype)).reshape(len(z), self.side, self.side, -1)
        for layer in self.decoder:
            # Doubled before the convolution: a sub-pixel one draws a grid (Odena et al. 2016).
            x = layer(pixel_norm(layers.leaky_relu(x)).repeat(2, 1).repeat(2, 2))
        drawn = self.drawn(pixel_norm(layers.leaky_relu(x))).astype(jnp.float32)
        full = (len(z), self.image_size, self.image_size, 3)
        return nn.sigmoid(jax.image.resize(drawn, full, "bilinear"))
