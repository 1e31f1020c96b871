"""Triplet loss with batch-hard, semi-hard or distance-weighted mining."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from afa.bounds import bounded
from afa.losses.base import (
    FAR,
    Labels,
    Loss,
    PRNGKey,
    Proxies,
    Result,
    Rows,
    State,
    euclidean,
    mean_over,
    pairs,
)

Square = Float[Array, "n n"]
Mask = Bool[Array, "n n"]
Chosen = Int[Array, "n n"]  # [a, p]: negative of the anchor a and its positive p


@dataclasses.dataclass(frozen=True)
class Triplet(Loss):
    """Triplet loss on cosines: the mean of max(0, s_an - s_ap + m) over the mined (a, p, n).

    - hard (batch-hard, Hermans et al. 2017, equation 5): for each anchor the farthest positive and
      the closest negative.
    - semi_hard (Schroff et al. 2015, section 3.2): for each positive pair the closest negative that
      is farther than the positive, or the farthest negative if there is none.
    - distance_weighted (Wu et al. 2017): for each positive pair a random negative with probability
      proportional to 1 / q(d) of its Euclidean distance d, where q(d) = d^(D - 2)
      (1 - d^2/4)^((D - 3)/2) is the density of distances on the sphere in D dimensions. d is at
      least the cutoff, and negatives beyond the upper bound are left out; if all are, each is
      equally likely.
    """

    name: str = "triplet"
    margin: float = bounded(0.1, least=0, most=2)
    """m, on the cosine. 0.1 is the margin 0.2 of squared distances between unit vectors (Schroff
    et al. 2015): |a - b|^2 = 2 - 2 a . b."""
    mining: Literal["hard", "semi_hard", "distance_weighted"] = "hard"
    """Choice of the triplets."""
    cutoff: float = bounded(0.5, above=0, below=2)
    """Distance-weighted: least distance in the weights (published: 0.5)."""
    upper_bound: float = bounded(1.4, above=0, below=2)
    """Distance-weighted: distance from which on negatives are left out (published: 1.4, authors'
    code)."""

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        s = x @ x.T
        positive, negative = pairs(y)
        valid = positive & negative.any(1, keepdims=True)
        if self.mining == "hard":
            hardest_positive = jnp.min(jnp.where(positive, s, -FAR), axis=1)
            hardest_negative = jnp.max(jnp.where(negative, s, FAR), axis=1)
            excess = jax.nn.relu(hardest_negative - hardest_positive + self.margin)
            return mean_over(excess, valid.any(1)), state
        if self.mining == "semi_hard":
            chosen = semi_hard(s, negative)
        else:
            weights = self.weights(s, negative, x.shape[1])
            chosen = sampled(key, weights)
        excess = jax.nn.relu(jnp.take_along_axis(s, chosen, axis=1) - s + self.margin)
        return mean_over(excess, valid), state

    def weights(self, s: Square, negative: Mask, dim: int) -> Square:
        """Probability of each negative n of each anchor a in distance-weighted mining; 0 for the
        others. Rows without a negative are arbitrary."""
        distance = euclidean(jax.lax.stop_gradient(s))
        d = jnp.clip(distance, self.cutoff, self.upper_bound)
        log_weight = (2 - dim) * jnp.log(d) - (dim - 3) / 2 * jnp.log(1 - jnp.square(d) / 4)
        close = negative & (distance < self.upper_bound)
        some = close.any(1, keepdims=True)
        logits = jnp.where(some, log_weight, 0)
        return jax.nn.softmax(jnp.where(jnp.where(some, close, negative), logits, FAR), axis=1)


def semi_hard(s: Square, negative: Mask) -> Chosen:
    """Returns the closest negative of a with s_an < s_ap, or the farthest negative of a."""
    beyond = negative[:, None, :] & (s[:, None, :] < s[:, :, None])  # [a, p, n]
    closest = jnp.argmax(jnp.where(beyond, s[:, None, :], FAR), axis=2)
    farthest = jnp.argmin(jnp.where(negative, s, -FAR), axis=1, keepdims=True)
    return jnp.where(beyond.any(2), closest, farthest)


def sampled(key: PRNGKey, weights: Square) -> Chosen:
    """Returns independent negatives for every (a, p), with the probabilities of the row a."""
    total = jnp.cumsum(weights, axis=1)
    point = jax.random.uniform(key, weights.shape) * total[:, -1:]
    chosen = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(total, point)
    # By rounding, a point may lie at the end of the row, beyond the last negative.
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=1, keepdims=True)
    return jnp.minimum(chosen, last)
