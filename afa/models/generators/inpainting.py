"""An inpainting generator: replaces the pixels that D finds damaged, and keeps the others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.config import GeneratorConfig
from afa.models import layers, views
from afa.models.generators.residual import Damage, Generator, Image
from afa.models.spaces import Shape
from afa.models.unet import clip_unit

SMALLEST_SIDE = 2  # of the maps from which `diffused` fills
DOUBT = 0.35  # D's estimate below which a pixel counts as intact
LEAST_KNOWN = 1e-6  # keeps an image without any intact pixel finite


class InpaintingGenerator(Generator):
    """`restore(x, d)`: x + m (clip(x0 + R(x0, m)) - x) with the part m of the damage d that exceeds
    doubt (`replaced`), the image x0 whose damaged pixels are filled from their surroundings
    (`diffused`), and a U-Net R. Without damage it is the identity, and untrained it gives x0.
    Otherwise as `residual.Generator`.

    R sees only what D left of the image. Finding the damage and undoing it, for which a generator
    of whole images has one pass, is here the work of two networks, and an intact pixel stays. R
    works on images of equal brightness and contrast, so neither changes what it draws.
    """

    def restore(self, images: Image, damage: Damage) -> Image:
        """Imperfect images and their damage -> restored images."""
        m = replaced(damage)
        filled = diffused(images, m)
        centre, spread = views.moments(filled, (1, 2, 3))
        known = jnp.concatenate([(filled - centre) / (2 * spread), 2 * m - 1], axis=-1)
        drawn = clip_unit(filled + 4 * spread * self.change(known))
        return images + m * (drawn - images)


class FillingGenerator(Generator):
    """Control of `InpaintingGenerator` without a network: damaged pixels are filled from their
    surroundings alone (`diffused`), so what it gains is D's."""

    def restore(self, images: Image, damage: Damage) -> Image:
        """Images and their damage -> x + m (x0 - x)."""
        m = replaced(damage)
        return images + m * (diffused(images, m) - images)


def replaced(damage: Damage) -> Float[Array, "b h w 1"]:
    """Weight of what is drawn: 0 up to `DOUBT`, then linear to 1. Blurred and noisy images, of
    which D is never sure, keep their pixels."""
    return jnp.maximum(damage - DOUBT, 0)[..., None] / (1 - DOUBT)


def diffused(images: Image, m: Float[Array, "b h w 1"]) -> Image:
    """Fills damaged pixels with means of intact ones over growing squares (pull-push; Gortler et
    al. 1996, section 3.4.2): (1 - m) x + m e, where e is the same of the image at half of the
    resolution, enlarged; at the end, the mean of all intact pixels."""
    known, weight = [(1 - m) * images], [1 - m]
    while known[-1].shape[1] > SMALLEST_SIDE and not any(n % 2 for n in known[-1].shape[1:3]):
        known.append(_halved(known[-1]))
        weight.append(_halved(weight[-1]))
    total, count = (each[-1].mean((1, 2), keepdims=True) for each in (known, weight))
    estimate = jnp.broadcast_to(total / jnp.maximum(count, LEAST_KNOWN), known[-1].shape)
    estimate = known[-1] + (1 - weight[-1]) * estimate
    for finer, w in zip(known[-2::-1], weight[-2::-1], strict=True):
        estimate = finer + (1 - w) * jax.image.resize(estimate, finer.shape, "bilinear")
    return estimate


def _halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def build(config: GeneratorConfig, shape: Shape, dtype: layers.Dtype) -> Generator:
    """Builds the generator `config.name` from its settings."""
    make = {"inpainting": InpaintingGenerator, "filling": FillingGenerator}[config.name]
    return make(config.width, config.levels, config.blocks, config.latent_dim, shape[0], dtype)
