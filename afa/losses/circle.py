"""Circle loss: every pair is weighted by its distance from the optimum."""

import dataclasses

import jax
import jax.numpy as jnp

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
    mean_over,
    pairs,
)


@dataclasses.dataclass(frozen=True)
class Circle(Loss):
    """Circle loss (Sun et al. 2020, equation 6) with g = gamma:

    mean_i log(1 + sum_N exp(g a_n (s_n - m)) sum_P exp(-g a_p (s_p - 1 + m))),
    a_p = max(0, 1 + m - s_p), a_n = max(0, s_n + m), over the rows with positives and negatives.

    The weights a have no gradient, as in the authors' code.
    """

    name: str = "circle"
    gamma: float = bounded(256.0, above=0)
    """Factor on the cosine (published: 256 for faces; 80 for fine-grained retrieval)."""
    margin: float = bounded(0.25, least=-1, most=1)
    """m (published: 0.25 for faces; 0.4 for fine-grained retrieval)."""

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        s, m = x @ x.T, self.margin
        positive, negative = pairs(y)
        positive_weight, negative_weight = (
            jax.lax.stop_gradient(jax.nn.relu(each)) for each in (1 + m - s, s + m)
        )
        near = jnp.where(positive, -self.gamma * positive_weight * (s - 1 + m), FAR)
        far = jnp.where(negative, self.gamma * negative_weight * (s - m), FAR)
        total = jax.nn.logsumexp(near, axis=1) + jax.nn.logsumexp(far, axis=1)
        return mean_over(jax.nn.softplus(total), positive.any(1) & negative.any(1)), state
