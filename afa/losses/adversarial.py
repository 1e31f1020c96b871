"""Losses of the generator G and the discriminator D, and PSNR.

None of them uses labels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Logits = Float[Array, "b"]
Maps = Float[Array, "b h w c"]  # images in [0, 1], or mid maps in units of their RMS

PIXELS = 4.0  # weight of `pixel_loss` beside `discriminator_loss`
CODE_PRIOR = 1e-4  # weight of the code divergence in nats relative to the reconstruction error


def discriminator_loss(
    real: Logits, fake: Float[Array, "f"], weights: Float[Array, "f"]
) -> Float[Array, ""]:
    """Cross-entropy loss of D from its logits (Goodfellow et al. 2014, equation 1).

    mean softplus(-D(x)) + sum_i w_i softplus(D(x^_i)); 2 ln 2 at the equilibrium.

    Args:
      real: logits of real images.
      fake: logits of the others.
      weights: w, of sum 1 in the mean over the devices.
    """
    return jnp.mean(jax.nn.softplus(-real)) + jnp.sum(weights * jax.nn.softplus(fake))


def generator_loss(fake: Logits) -> Float[Array, ""]:
    """Non-saturating loss of G (Goodfellow et al. 2014, section 3): mean softplus(-D(x^))."""
    return jnp.mean(jax.nn.softplus(-fake))


def pixel_loss(pixels: Float[Array, "b h w"], damage: Bool[Array, "b h w"]) -> Float[Array, ""]:
    """Mean cross-entropy of D's logits that pixels are real (Schönfeld et al. 2020, equation 4):
    softplus(D) for damaged and softplus(-D) for intact pixels.

    Args:
      damage: whether a pixel is damaged.
    """
    return jnp.mean(jax.nn.softplus(jnp.where(damage, pixels, -pixels)))


def r1_penalty(discriminator: Callable[[Maps], Logits], real: Maps) -> Float[Array, ""]:
    """R1 gradient penalty on real images (Mescheder et al. 2018, equation 9).

    1/2 E ||grad D(x)||^2.
    """
    gradient = jax.grad(lambda x: jnp.sum(discriminator(x)))(real)
    return 0.5 * jnp.mean(jnp.sum(jnp.square(gradient), axis=(1, 2, 3)))


def reconstruction(images: Maps, target: Maps) -> Float[Array, ""]:
    """Mean over the images of sqrt(MSE + 1e-4), with the mean squared error MSE of each image.

    Images with the largest errors (half covered) dominate the gradient of the squared error itself;
    clean images dominate that of its logarithm (the mean PSNR). The root is a compromise, with
    which every kind of corruption is learned. 1e-4 is 40 dB.
    """
    error = jnp.mean(jnp.square(images - target), axis=(1, 2, 3))
    return jnp.mean(jnp.sqrt(error + 1e-4))


def code_divergence(
    mean: Float[Array, "b z"], log_variance: Float[Array, "b z"]
) -> Float[Array, ""]:
    """Mean Kullback-Leibler divergence of the codes from the standard normal distribution, in nats
    (Kingma & Welling 2014, appendix B): 1/2 sum (m^2 + s^2 - 1 - ln s^2)."""
    terms = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
    return 0.5 * jnp.mean(jnp.sum(terms, axis=-1))


def psnr(restored: Maps, clean: Maps) -> Float[Array, "b"]:
    """Peak signal-to-noise ratio per image in dB, for a peak of 1; capped at 60."""
    error = jnp.mean(jnp.square(restored - clean), axis=(1, 2, 3))
    return -10 * jnp.log10(error + 1e-6)
