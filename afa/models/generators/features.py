"""A residual generator of mid maps: G restores features of F instead of images."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.config import GeneratorConfig
from afa.models import layers
from afa.models.spaces import Shape, rms
from afa.models.unet import ResidualBlock, pixel_norm

Mid = Float[Array, "b h w c"]


class FeatureGenerator(nn.Module):
    """`restore(h)`: h + R(h) at the resolution of the mid map h, for CNNs and transformers.

    R is a 1x1 convolution to `width` channels, residual blocks of two 3x3 convolutions, and a 1x1
    convolution back that starts at zero. It reads h in units of its RMS, so the scale of the
    features does not matter. `sample` draws h from a code z by a dense layer, blocks and a 1x1
    convolution; `encode` is a 1x1 convolution and a dense layer.
    """

    width: int
    blocks: int
    latent_dim: int
    shape: Shape
    dtype: layers.Dtype = jnp.float32

    def setup(self) -> None:
        height, width, channels = self.shape

        def make(features: int, **more) -> nn.Conv:
            return layers.conv(features, 1, dtype=self.dtype, use_bias=True, **more)

        def blocks() -> list[ResidualBlock]:
            return [ResidualBlock(self.width, self.dtype) for _ in range(self.blocks)]

        self.first, self.middle = make(self.width), blocks()
        self.last = make(channels, kernel_init=nn.initializers.zeros)
        self.read, self.code = make(self.width), nn.Dense(2 * self.latent_dim, dtype=self.dtype)
        self.noise = nn.Dense(height * width * self.width, dtype=self.dtype)
        self.decoder, self.drawn = blocks(), make(channels)

    def restore(self, mid: Mid, damage: Float[Array, "b h w"]) -> Mid:
        """Imperfect mid maps -> clean mid maps; the damage is not used."""
        scale = rms(mid)
        x = self.first((mid / scale).astype(self.dtype))
        for block in self.middle:
            x = block(x)
        return mid + scale * self.last(layers.leaky_relu(x)).astype(jnp.float32)

    def encode(self, mid: Mid) -> tuple[Float[Array, "b z"], Float[Array, "b z"]]:
        """Mid maps -> mean and logarithm of the variance of their codes."""
        x = layers.leaky_relu(self.read(mid.astype(self.dtype)))
        out = self.code(x.reshape(len(x), -1)).astype(jnp.float32)
        mean, log_variance = jnp.split(out, 2, -1)
        return mean, log_variance

    def sample(self, z: Float[Array, "b z"]) -> Mid:
        """Noise, or codes -> mid maps."""
        height, width, _ = self.shape
        x = self.noise(z.astype(self.dtype)).reshape(len(z), height, width, self.width)
        for block in self.decoder:
            x = block(x)
        return self.drawn(pixel_norm(layers.leaky_relu(x))).astype(jnp.float32)

    def __call__(self, mid: Mid, z: Float[Array, "b z"]) -> tuple[Mid, Mid]:
        """Both modes at once; initialises every parameter."""
        self.encode(mid)
        return self.restore(mid, jnp.zeros(mid.shape[:-1])), self.sample(z)


def build(config: GeneratorConfig, shape: Shape, dtype: layers.Dtype) -> FeatureGenerator:
    """Builds the generator from its settings; `generator.levels` is for images only."""
    return FeatureGenerator(config.width, config.blocks, config.latent_dim, shape, dtype)
