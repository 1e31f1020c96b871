"""Supervised contrastive loss."""

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
class SupCon(Loss):
    """Supervised contrastive loss (Khosla et al. 2020, equation 2):

    mean_i mean_{p in P(i)} -log( exp(s_ip/T) / sum_{j != i} exp(s_ij/T) ).
    """

    name: str = "supcon"
    temperature: float = bounded(0.1, above=0)
    """T, divides the cosine (published: 0.1)."""

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        logits = jnp.where(jnp.eye(len(y), dtype=bool), FAR, x @ x.T / self.temperature)
        log_prob = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)
        positive, _ = pairs(y)
        mean = jnp.sum(jnp.where(positive, log_prob, 0), 1) / jnp.maximum(positive.sum(1), 1)
        return mean_over(-mean, positive.any(1)), state
