"""A residual generator at half of the resolution, with a decoder of noise beside it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from afa.config import GeneratorConfig
from afa.models import layers
from afa.models.spaces import Shape

Image = Float[Array, "b h w 3"]
SMALLEST_MAP = 7  # pixels: the decoder of noise begins with a map of at most this side, if it can


@jax.custom_vjp
def clip_unit(x: Image) -> Image:
    """x clipped to [0, 1]; its gradient lives outside too, where a step against it leads inside.

    The gradient of a plain clip is zero for every pixel that is out of range, so that nothing
    pulls it back.
    """
    return jnp.clip(x, 0, 1)


def _clip_backward(x: Image, cotangent: Image) -> tuple[Image]:
    outwards = ((x < 0) & (cotangent > 0)) | ((x > 1) & (cotangent < 0))
    return (jnp.where(outwards, 0, cotangent),)


clip_unit.defvjp(lambda x: (jnp.clip(x, 0, 1), x), _clip_backward)


def pixel_norm(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Unit mean square over the channels of every pixel (Karras et al. 2018, section 4.2)."""
    wide = jnp.square(x.astype(jnp.float32))
    return x * lax.rsqrt(wide.mean(-1, keepdims=True) + 1e-6).astype(x.dtype)


def to_space(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    """Depth to space: four channels become two by two pixels (Shi et al. 2016)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


class Upsample(nn.Module):
    """Doubles the side by a transposed convolution in its sub-pixel form (Shi et al. 2016): a
    convolution to four times the channels at low resolution, then depth to space."""

    features: int
    kernel: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        conv = layers.conv(
            4 * self.features, self.kernel, dtype=self.dtype, use_bias=True, name="conv"
        )
        return to_space(conv(x))


class ResidualBlock(nn.Module):
    """x + two 3x3 convolutions of x, each after an activation. No normalisation: the absolute
    values of an image matter. The second convolution starts small, so that depth adds little."""

    features: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        def conv(name: str, gain: float) -> nn.Conv:
            start = nn.initializers.variance_scaling(gain, "fan_in", "normal")
            return layers.conv(
                self.features, 3, dtype=self.dtype, use_bias=True, name=name, kernel_init=start
            )

        inner = conv("conv1", 2.0)(layers.leaky_relu(x))
        return x + conv("conv2", 0.2)(layers.leaky_relu(inner))


class Generator(nn.Module):
    """Two networks under one name: `restore` of images, and a decoder of noise with its encoder.

    `restore(x)`: clip(x + R(x)). R begins at half of the resolution (4x4, stride 2), halves it
    further with twice the channels, and comes back by sub-pixel convolutions, skips added. Its last
    layer starts at zero: an untrained generator is the identity, at every width and depth.
    `sample(z)`: sigmoid(decoder(z)), drawn at half of the resolution and enlarged. `encode(x)`:
    mean and logarithm of the variance of the code z of an image, by which the decoder learns from
    images (Kingma & Welling 2014).
    Images lie in [0, 1], in and out.
    """

    width: int  # channels at half of the resolution, doubled with every further halving
    levels: int
    blocks: int
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

        widths = [self.width * 2**level for level in range(self.levels)]
        self.first = make(widths[0], 4, 2, 1)
        self.down = [make(each, 3, 2) for each in widths[1:]]
        self.bottom = [ResidualBlock(widths[-1], self.dtype) for _ in range(self.blocks)]
        self.up = [Upsample(each, 1, self.dtype) for each in reversed(widths[:-1])]
        self.merge = [ResidualBlock(each, self.dtype) for each in reversed(widths[:-1])]
        self.last = make(12, 3, kernel_init=nn.initializers.zeros)

        side, halvings = self.image_size // 2, 1
        while side % 2 == 0 and side > SMALLEST_MAP:
            side, halvings = side // 2, halvings + 1
        self.side = side
        channels = [max(self.width // 2, 1) * min(2**level, 8) for level in range(halvings)]
        self.encoder = [make(each, 4, 2, 1) for each in channels]
        self.code = nn.Dense(2 * self.latent_dim, dtype=self.dtype)
        self.noise = nn.Dense(side**2 * channels[-1], dtype=self.dtype)
        self.decoder = [make(each, 3) for each in reversed(channels[:-1])]
        self.drawn = make(3, 3, kernel_init=nn.initializers.normal(1e-2))

    def restore(self, images: Image) -> Image:
        """Imperfect images -> clean images x^."""
        x = self.first((2 * images - 1).astype(self.dtype))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(layers.leaky_relu(x))
        for block in self.bottom:
            x = block(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(up(layers.leaky_relu(x)) + skips.pop())
        change = to_space(self.last(layers.leaky_relu(x))).astype(jnp.float32)
        return clip_unit(images + change)

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

    def __call__(self, images: Image, z: Float[Array, "b z"]) -> tuple[Image, Image]:
        """Both modes at once; initialises every parameter."""
        self.encode(images)
        return self.restore(images), self.sample(z)


def build(config: GeneratorConfig, shape: Shape, dtype: layers.Dtype) -> Generator:
    """Builds the generator from its settings."""
    return Generator(config.width, config.levels, config.blocks, config.latent_dim, shape[0], dtype)
