"""Multi-Similarity loss: pair mining and soft pair weights."""

import dataclasses

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
    log1p_sum,
    pairs,
)


@dataclasses.dataclass(frozen=True)
class MultiSimilarity(Loss):
    """Multi-Similarity (Wang et al. 2019, equations 14 to 16), a = alpha, b = beta, t = threshold:

    mean_i log(1 + sum_P exp(-a(s - t)))/a + log(1 + sum_N exp(b(s - t)))/b over the mined pairs:
    negatives with s > min_P s - margin and positives with s < max_N s + margin.
    """

    name: str = "multi_similarity"
    alpha: float = bounded(2.0, above=0)
    """Scale of the positive pairs (published: 2)."""
    beta: float = bounded(50.0, above=0)
    """Scale of the negative pairs (published: 50)."""
    threshold: float = bounded(0.5, least=-1, most=1)
    """lambda, offset of the cosine (0.5 in the authors' code, 1 in the paper's text)."""
    margin: float = bounded(0.1, least=0, most=2)
    """epsilon of the pair mining, on the cosine (published: 0.1)."""

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        a, b, t = self.alpha, self.beta, self.threshold
        s = x @ x.T
        positive, negative = pairs(y)
        farthest = jnp.min(jnp.where(positive, s, -FAR), axis=1, keepdims=True)
        closest = jnp.max(jnp.where(negative, s, FAR), axis=1, keepdims=True)
        positive &= s < closest + self.margin
        negative &= s > farthest - self.margin
        positive_term = log1p_sum(-a * (s - t), positive, axis=1)
        negative_term = log1p_sum(b * (s - t), negative, axis=1)
        return jnp.mean(positive_term / a + negative_term / b), state
