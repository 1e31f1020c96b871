"""Triplet loss with batch-hard mining."""

import dataclasses

import jax
import jax.numpy as jnp

from afa.bounds import bounded
from afa.losses.base import FAR, Labels, Loss, Proxies, Rows, Scalar, State, mean_over, pairs


@dataclasses.dataclass(frozen=True)
class Triplet(Loss):
    """Triplet loss with batch-hard mining (Hermans et al. 2017, equation 5) on cosines:
    mean_i max(0, max_N s - min_P s + m)."""

    name: str = "triplet"
    margin: float = bounded(0.1, least=0, most=2)
    """m, on the cosine. 0.1 is the margin 0.2 of squared distances between unit vectors (Schroff
    et al. 2015): |a - b|^2 = 2 - 2 a . b."""

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies) -> tuple[Scalar, State]:
        s = x @ x.T
        positive, negative = pairs(y)
        hardest_positive = jnp.min(jnp.where(positive, s, -FAR), axis=1)
        hardest_negative = jnp.max(jnp.where(negative, s, FAR), axis=1)
        valid = positive.any(1) & negative.any(1)
        excess = jax.nn.relu(hardest_negative - hardest_positive + self.margin)
        return mean_over(excess, valid), state
