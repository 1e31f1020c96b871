"""Proxy Synthesis: normalised softmax with synthetic descriptors and classes."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from afa.bounds import bounded
from afa.losses.base import (
    FAR,
    Labels,
    Loss,
    PRNGKey,
    Proxies,
    Result,
    Rows,
    Scalar,
    State,
    mean_over,
    row_cross_entropy,
    unit,
)


@dataclasses.dataclass(frozen=True)
class ProxySynthesis(Loss):
    """Proxy Synthesis (Gu et al. 2021) on the normalised softmax.

    mu n synthetic descriptors r x_i + (1 - r) x_j and proxies r p_(y_i) + (1 - r) p_(y_j), divided
    by their norm, with r ~ Beta(alpha, alpha) drawn once per step and random pairs y_i != y_j. They
    are further rows and further classes of the cross-entropy of s x . p, the mean over all rows.
    Synthetic rows of one pair of classes (y_i, y_j) have one proxy, so they are one class. A batch
    of one class has none.
    """

    name: str = "proxy_synthesis"
    scale: float = bounded(23.0, above=0)
    """s, factor on the cosine (published: 23, authors' code for the normalised softmax)."""
    alpha: float = bounded(0.4, above=0)
    """Of the Beta distribution (published: 0.4)."""
    mu: float = bounded(1.0, above=0)
    """Synthetic descriptors as a fraction of the batch (published: 1)."""

    @property
    def uses_proxies(self) -> bool:
        return True

    @property
    def posterior_temperature(self) -> float:
        return 1 / self.scale

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        rate, i, j = draw(key, y, max(round(self.mu * len(y)), 1), self.alpha)
        usable = y[i] != y[j]
        same = (y[i][:, None] == y[i][None, :]) & (y[j][:, None] == y[j][None, :])
        first = jnp.argmax(same, axis=1)  # the first row of each pair of classes has its proxy
        is_class = usable & (first == jnp.arange(len(first)))
        rows = jnp.concatenate([x, unit(rate * x[i] + (1 - rate) * x[j])])
        synthetic = unit(rate * proxies[y[i]] + (1 - rate) * proxies[y[j]])
        logits = self.scale * rows @ jnp.concatenate([proxies, synthetic]).T
        real = len(proxies)
        logits = logits.at[:, real:].set(jnp.where(is_class, logits[:, real:], FAR))
        losses = row_cross_entropy(logits, jnp.concatenate([y, real + first]))
        return mean_over(losses, jnp.concatenate([jnp.ones(len(y), bool), usable])), state


def draw(
    key: PRNGKey, y: Labels, count: int, alpha: float
) -> tuple[Scalar, Int[Array, "m"], Int[Array, "m"]]:
    """Returns r and the rows i, j of `count` pairs of different classes.

    i goes through the batch in order; j is random. If the batch has one class only, the pairs are
    arbitrary.
    """
    rate_key, pair_key = jax.random.split(key)
    rate = jax.random.beta(rate_key, alpha, alpha)
    i = jnp.arange(count) % len(y)
    allowed = y[i][:, None] != y[None, :]
    logits: Float[Array, "m n"] = jnp.where(allowed, 0.0, FAR)
    return rate, i, jax.random.categorical(pair_key, logits)
