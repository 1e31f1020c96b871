"""Perturbations of the mid map h of F in training: h + delta makes the batch harder.

A perturbation is a function of (h, gradient g of the loss with respect to h, `Draws`, epsilon), and
one line of `PERTURBATIONS`. The result carries no gradient (stop-gradient).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Maps = Float[Array, "b h w c"]


class Draws(NamedTuple):
    """What the images of a device's part of the batch need beside their maps.

    Attributes:
      strength: random keys, one per image, for u.
      direction: the same, for everything else.
      gather: returns an array with the rows of all devices.
    """

    strength: Key[Array, "b"]
    direction: Key[Array, "b"]
    gather: Callable[[Array], Array]


Perturbation = Callable[[Maps, Maps, Draws, float], Maps]

MIXSTYLE_ALPHA = 0.1  # published: of the Beta distribution of the mixing weight


def gradient(mid: Maps, g: Maps, draws: Draws, epsilon: float) -> Maps:
    """eps u ||h|| g / ||g||: one normalised step of gradient ascent, u ~ U(0, 1) for each image
    (A-FAN, Chen et al. 2021, section 3.2)."""
    return scaled(mid, g, draws, epsilon)


def random(mid: Maps, g: Maps, draws: Draws, epsilon: float) -> Maps:
    """Control of `gradient`: same norm, random direction."""
    return scaled(mid, _normal(draws, mid.shape[1:]), draws, epsilon)


def statistics(mid: Maps, g: Maps, draws: Draws, epsilon: float) -> Maps:
    """Moves only the mean m and the deviation s of each channel of each image, along the gradient
    (AdvBN, Shu et al. 2021): delta = a (h - m) + b s, with a = sum_xy g (h - m) and
    b = sum_xy g s, scaled to the norm eps u ||h||."""
    centred, deviation = _standardised(mid)
    wide = g.astype(jnp.float32)
    a = jnp.sum(wide * centred, (1, 2), keepdims=True)
    b = jnp.sum(wide, (1, 2), keepdims=True) * deviation
    return scaled(mid, a * centred + b * deviation, draws, epsilon)


def random_statistics(mid: Maps, g: Maps, draws: Draws, epsilon: float) -> Maps:
    """Control of `statistics`: a and b are random, with the same norm of delta."""
    centred, deviation = _standardised(mid)
    a, b = jnp.split(_normal(draws, (1, 1, 2 * mid.shape[-1])), 2, axis=-1)
    return scaled(mid, a * centred + b * deviation, draws, epsilon)


def either(mid: Maps, g: Maps, draws: Draws, epsilon: float) -> Maps:
    """`gradient` for a random half of the images, `statistics` for the others."""
    first = jax.vmap(jax.random.bernoulli)(draws.direction)
    pair = (each(mid, g, draws, epsilon) for each in (gradient, statistics))
    return jnp.where(first[:, None, None, None], *pair)


def mixstyle(mid: Maps, g: Maps, draws: Draws, epsilon: float) -> Maps:
    """MixStyle (Zhou et al. 2021, equations 4 to 6), without adversary: the mean and deviation of
    each channel become w times the own ones + (1 - w) times those of a random image of the batch,
    w ~ Beta(0.1, 0.1). Epsilon is not used: only 0 turns it off."""
    centred, deviation = _standardised(mid)
    mean = mid.astype(jnp.float32) - centred
    own = mean[:, :1, :1], deviation
    everyone = [draws.gather(each) for each in own]
    count = len(everyone[0])
    partner = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(draws.direction)
    weight = jax.vmap(lambda key: jax.random.beta(key, MIXSTYLE_ALPHA, MIXSTYLE_ALPHA))
    w = weight(draws.strength)[:, None, None, None]
    new_mean, new_deviation = (
        w * a + (1 - w) * b[partner] for a, b in zip(own, everyone, strict=True)
    )
    delta = new_mean - mean + centred * (new_deviation / deviation - 1)
    return jax.lax.stop_gradient(delta).astype(mid.dtype)


PERTURBATIONS: dict[str, Perturbation] = {
    "gradient": gradient,
    "random": random,
    "statistics": statistics,
    "random_statistics": random_statistics,
    "either": either,
    "mixstyle": mixstyle,
}


def scaled(mid: Maps, direction: Maps, draws: Draws, epsilon: float) -> Maps:
    """eps u ||h|| d / ||d|| with u ~ U(0, 1) for each image; 0 for d = 0.

    The size is relative to ||h||, so one epsilon fits all stages of training.

    Args:
      mid: h.
      direction: d.
      draws: has the keys of the strength u.
      epsilon: largest norm, as a fraction of ||h||.
    """
    strength = epsilon * jax.vmap(jax.random.uniform)(draws.strength)[:, None, None, None]
    size = strength * _norm(mid) / _norm(direction)
    return jax.lax.stop_gradient(size * direction.astype(jnp.float32)).astype(mid.dtype)


def _norm(x: Maps) -> Float[Array, "b 1 1 1"]:
    wide = jnp.square(x.astype(jnp.float32))
    return jnp.sqrt(jnp.sum(wide, axis=(1, 2, 3), keepdims=True) + 1e-20)


def _standardised(mid: Maps) -> tuple[Maps, Float[Array, "b 1 1 c"]]:
    """h - m, and the deviation s of each channel of each image."""
    wide = mid.astype(jnp.float32)
    centred = wide - wide.mean((1, 2), keepdims=True)
    return centred, jnp.sqrt(jnp.square(centred).mean((1, 2), keepdims=True) + 1e-12)


def _normal(draws: Draws, shape: tuple[int, ...]) -> Float[Array, "b _ _ _"]:
    return jax.vmap(lambda key: jax.random.normal(key, shape))(draws.direction)
