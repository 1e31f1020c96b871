"""Blocks of image-to-image networks: residual blocks, sub-pixel upsampling, and a U-Net of them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from afa.models import layers

Maps = Float[Array, "b h w c"]


@jax.custom_vjp
def clip_unit(x: Maps) -> Maps:
    """x clipped to [0, 1]; its gradient lives outside too, where a step against it leads inside.

    The gradient of a plain clip is zero for every pixel that is out of range, so that nothing
    pulls it back.
    """
    return jnp.clip(x, 0, 1)


def _clip_backward(x: Maps, cotangent: Maps) -> tuple[Maps]:
    outwards = ((x < 0) & (cotangent > 0)) | ((x > 1) & (cotangent < 0))
    return (jnp.where(outwards, 0, cotangent),)


clip_unit.defvjp(lambda x: (jnp.clip(x, 0, 1), x), _clip_backward)


def pixel_norm(x: Maps) -> Maps:
    """Unit mean square over the channels of every pixel (Karras et al. 2018, section 4.2)."""
    wide = jnp.square(x.astype(jnp.float32))
    return x * lax.rsqrt(wide.mean(-1, keepdims=True) + 1e-6).astype(x.dtype)


def to_space(x: Maps) -> Float[Array, "b h2 w2 d"]:
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
    def __call__(self, x: Maps) -> Float[Array, "b h2 w2 d"]:
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
    def __call__(self, x: Maps) -> Maps:
        def conv(name: str, gain: float) -> nn.Conv:
            start = nn.initializers.variance_scaling(gain, "fan_in", "normal")
            return layers.conv(
                self.features, 3, dtype=self.dtype, use_bias=True, name=name, kernel_init=start
            )

        inner = conv("conv1", 2.0)(layers.leaky_relu(x))
        return x + conv("conv2", 0.2)(layers.leaky_relu(inner))


class UNet(nn.Module):
    """An image-to-image network that begins at half of the resolution (4x4, stride 2), halves it
    further with twice the channels, and comes back by sub-pixel convolutions, skips added. Its last
    layer starts at zero."""

    width: int  # channels at half of the resolution, doubled with every further halving
    levels: int  # halvings
    blocks: int  # residual blocks at the lowest resolution, and one at every other
    channels: int  # of the output, at full resolution
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
        self.last = make(4 * self.channels, 3, kernel_init=nn.initializers.zeros)

    def __call__(self, x: Maps) -> Float[Array, "b h w d"]:
        x = self.first(x.astype(self.dtype))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(layers.leaky_relu(x))
        for block in self.bottom:
            x = block(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(up(layers.leaky_relu(x)) + skips.pop())
        return to_space(self.last(layers.leaky_relu(x))).astype(jnp.float32)
