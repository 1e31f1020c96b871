"""The discriminator: image or mid map -> logit that it is real, the same for every pixel, and a
descriptor of its feature maps."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from afa.models import layers, views
from afa.models.spaces import IMAGES, Space
from afa.models.unet import ResidualBlock, Upsample, to_space


class Verdict(NamedTuple):
    """Attributes:
    logit: that the whole is real.
    features: D's pooled maps, of unit length.
    pixels: logit that a pixel is real; None without `Discriminator.localise`.
    """

    logit: Float[Array, "b"]
    features: Float[Array, "b d"]
    pixels: Float[Array, "b h w"] | None


class Discriminator(nn.Module):
    """Strided convolutions, one logit (Radford et al. 2016), optionally with spectral
    normalisation (Miyato et al. 2018). No batch statistics: a verdict concerns one image.

    With `localise`, a decoder with skips gives a logit for every pixel (Schönfeld et al. 2020).
    It sees images of equal brightness and contrast, and needs few channels at low resolution. What
    a median filter removes from them, which shows where an image was changed (Zhou et al. 2018
    take fixed high-pass filters), is a further input, and also enters at full resolution.

    x are points of the space of the generator.
    """

    width: int
    levels: int
    spectral_norm: bool = False
    dtype: layers.Dtype = jnp.float32
    space: Space = IMAGES
    localise: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Verdict:
        def wrap(layer: nn.Module, x: Array) -> Array:
            if not self.spectral_norm:
                return layer(x)
            return nn.SpectralNorm(layer, collection_name="batch_stats")(x, update_stats=train)

        x = self.space.centred(x, level=self.localise).astype(self.dtype)
        residue = _residue(x) if self.localise else None
        maps = []
        x = x if residue is None else jnp.concatenate([x, residue], axis=-1)
        for level in range(self.levels):
            features = self.width * min(2**level, 2 if self.localise else 8)
            x = layers.leaky_relu(
                wrap(layers.conv(features, 3, 2, dtype=self.dtype, use_bias=True), x)
            )
            maps.append(x)
        flat = x.reshape(x.shape[0], -1)
        logit = wrap(nn.Dense(1, dtype=self.dtype), flat).astype(jnp.float32)[:, 0]
        pooled = [each.astype(jnp.float32).mean((1, 2)) for each in maps[-2:]]
        pixels = None if residue is None else self._pixels(maps, residue)
        return Verdict(logit, layers.l2_normalise(jnp.concatenate(pooled, axis=-1)), pixels)

    def _pixels(
        self, maps: list[Float[Array, "b _ _ _"]], residue: Float[Array, "b h w 6"]
    ) -> Float[Array, "b h w"]:
        """Feature maps of falling resolution -> logits of the pixels; 0 before training."""
        x = ResidualBlock(maps[-1].shape[-1], self.dtype)(maps[-1])
        for skip in maps[-2::-1]:
            features = skip.shape[-1]
            x = Upsample(features, 1, self.dtype)(layers.leaky_relu(x)) + skip
            x = ResidualBlock(features, self.dtype)(x)
        zeros = nn.initializers.zeros
        last = layers.conv(4, 3, dtype=self.dtype, use_bias=True, kernel_init=zeros)
        fine = layers.conv(4, 4, 2, dtype=self.dtype, kernel_init=zeros)
        logits = last(layers.leaky_relu(x)) + fine(residue)
        return to_space(logits).astype(jnp.float32)[..., 0]


def _residue(x: Float[Array, "b h w 3"]) -> Float[Array, "b h w 6"]:
    """x less its median-filtered copy, and its absolute value.

    The copy has no gradient: its second derivative, for the gradient penalty, would take nine times
    as long as the rest.
    """
    removed = x - jax.lax.stop_gradient(views.median(x))
    return jnp.concatenate([removed, jnp.abs(removed)], axis=-1)


def diffaugment(images: Float[Array, "b h w 3"], keys: Key[Array, "b"]) -> Float[Array, "b h w 3"]:
    """Brightness, contrast, shift and cutout, differentiable in the image (Zhao et al. 2020).

    Each image draws from its own key: brightness +-0.2, contrast 0.7 to 1.3, a shift of up to an
    eighth of the side, and a grey square of a quarter of the side.
    """
    height, width = images.shape[1:3]

    def one(image: Float[Array, "h w 3"], key: Key[Array, ""]) -> Float[Array, "h w 3"]:
        draw = jax.random.uniform(key, (6,))
        image = image + 0.4 * (draw[0] - 0.5)
        mean = image.mean()
        image = mean + (image - mean) * (0.7 + 0.6 * draw[1])
        reach_y, reach_x = height // 8, width // 8
        shift = (
            (draw[2] * (2 * reach_y + 1)).astype(int),
            (draw[3] * (2 * reach_x + 1)).astype(int),
        )
        padded = jnp.pad(image, ((reach_y, reach_y), (reach_x, reach_x), (0, 0)))
        image = jax.lax.dynamic_slice(padded, (*shift, 0), image.shape)
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
        inside = (jnp.abs(rows - draw[4] * height) < height / 8) & (
            jnp.abs(columns - draw[5] * width) < width / 8
        )
        return jnp.where(inside[..., None], 0.5, image)

    return jax.vmap(one)(images, keys)
