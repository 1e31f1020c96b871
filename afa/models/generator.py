"""The generator: noise to image, and imperfect image to clean image, by one decoder."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from afa.models import layers

Image = Float[Array, "b h w 3"]


def pixel_norm(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Unit mean square over the channels of every pixel (Karras et al. 2018, section 4.2)."""
    wide = jnp.square(x.astype(jnp.float32))
    return x * lax.rsqrt(wide.mean(-1, keepdims=True) + 1e-6).astype(x.dtype)


class Upsample(nn.Module):
    """Doubles the side by a transposed convolution in its sub-pixel form (Shi et al. 2016): a 3x3
    convolution to four times the channels at low resolution, then depth to space."""

    features: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        b, h, w, _ = x.shape
        x = layers.conv(4 * self.features, 3, dtype=self.dtype, use_bias=True, name="conv")(x)
        x = x.reshape(b, h, w, 2, 2, self.features)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, self.features)


class Generator(nn.Module):
    """Encoder-decoder with skips; the decoder alone turns noise into images.

    `restore(x, z)`: x + decoder(encoder(x) + code(z), skips), so that an untrained generator
    leaves the image almost alone. `sample(z)`: 1/2 + decoder(code(z), no skips).
    Images lie in [0, 1]; the output is not clipped, so that its gradient lives.
    """

    width: int
    levels: int
    latent_dim: int
    image_size: int
    dtype: layers.Dtype = jnp.float32

    def setup(self) -> None:
        widths = [self.width * min(2**level, 8) for level in range(self.levels + 1)]

        def make(features: int, strides: int = 1) -> nn.Conv:
            return layers.conv(features, 3, strides, dtype=self.dtype, use_bias=True)

        self.first = make(widths[0])
        self.down = [make(features, 2) for features in widths[1:]]
        self.middle = make(widths[-1])
        self.side = self.image_size // 2**self.levels
        self.code_channels = widths[-1]
        self.code = nn.Dense(self.side**2 * widths[-1], dtype=self.dtype)
        self.up = [Upsample(features, self.dtype) for features in reversed(widths[:-1])]
        self.merge = [make(features) for features in reversed(widths[:-1])]
        self.last = layers.conv(
            3, 3, dtype=self.dtype, use_bias=True, kernel_init=nn.initializers.normal(1e-2)
        )

    def _code(self, z: Float[Array, "b z"]) -> Float[Array, "b s s c"]:
        return self.code(z).reshape(z.shape[0], self.side, self.side, self.code_channels)

    def _decode(self, x: Float[Array, "b s s c"], skips: list[Array] | None) -> Image:
        for level, (up, merge) in enumerate(zip(self.up, self.merge, strict=True)):
            x = layers.leaky_relu(up(x))
            if skips is not None:
                x = x + skips[-1 - level]
            x = pixel_norm(layers.leaky_relu(merge(x)))
        return self.last(x).astype(jnp.float32)

    def restore(self, images: Image, z: Float[Array, "b z"]) -> Image:
        """Imperfect images (and noise) -> clean images x^."""
        x = layers.leaky_relu(self.first((2 * images - 1).astype(self.dtype)))
        skips = []
        for down in self.down:
            skips.append(x)
            x = pixel_norm(layers.leaky_relu(down(x)))
        x = x + layers.leaky_relu(self.middle(x)) + self._code(z)
        return images + self._decode(x, skips)

    def sample(self, z: Float[Array, "b z"]) -> Image:
        """Noise -> images."""
        return 0.5 + self._decode(pixel_norm(self._code(z)), None)

    def __call__(self, images: Image, z: Float[Array, "b z"]) -> tuple[Image, Image]:
        """Both modes at once; initialises every parameter."""
        return self.restore(images, z), self.sample(z)
