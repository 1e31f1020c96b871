"""NT-Xent: cross-entropy of each positive pair against the negatives of its anchor."""

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
class NTXent(Loss):
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, "A simple framework for
    contrastive learning", equation 1), with the positive pairs of the labels:

    mean over all (i, p in P(i)) of -log( exp(s_ip/T) / (exp(s_ip/T) + sum_N exp(s_in/T)) ).

    Unlike `supcon`, the denominator has no other positives.
    """

    name: str = "nt_xent"
    temperature: float = bounded(0.1, above=0)
    """T, divides the cosine (published: 0.1, the best one on ImageNet)."""

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        logits = x @ x.T / self.temperature
        positive, negative = pairs(y)
        others = jax.nn.logsumexp(jnp.where(negative, logits, FAR), axis=1, keepdims=True)
        return mean_over(jax.nn.softplus(others - logits), positive), state
