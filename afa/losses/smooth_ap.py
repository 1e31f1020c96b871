"""Smooth-AP: a differentiable average precision."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from afa.bounds import bounded
from afa.losses.base import (
    Labels,
    Loss,
    PRNGKey,
    Proxies,
    Result,
    Rows,
    Scalar,
    State,
    mean_over,
    pairs,
)


@dataclasses.dataclass(frozen=True)
class SmoothAP(Loss):
    """Smooth-AP (Brown et al. 2020): 1 - AP_i, the mean over the rows i with positives, where each
    row is a query and the others are its gallery:

    AP_i = mean_{p in P(i)} (1 + sum_{q in P(i), q != p} G(s_iq - s_ip))
                            / (1 + sum_{q in P(i) and N(i), q != p} G(s_iq - s_ip)),

    with the sigmoid G(d) = 1 / (1 + exp(-d / tau)) in place of the step function. Memory is
    proportional to the cube of the batch size.
    """

    name: str = "smooth_ap"
    tau: float = bounded(0.01, above=0)
    """Temperature of the sigmoid, on the cosine (published: 0.01)."""

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        positive, negative = pairs(y)
        precision = jax.vmap(self._average_precision)(x @ x.T, positive, negative)
        return mean_over(1 - precision, positive.any(1)), state

    def _average_precision(
        self, s: Float[Array, "n"], positive: Bool[Array, "n"], negative: Bool[Array, "n"]
    ) -> Scalar:
        """AP of one query; 0 without positives."""
        before = jax.nn.sigmoid((s[None, :] - s[:, None]) / self.tau)  # [p, q]
        other_positive = positive[None, :] & ~jnp.eye(len(s), dtype=bool)
        rank = 1 + jnp.sum(jnp.where(other_positive, before, 0), axis=1)
        precision = rank / (rank + jnp.sum(jnp.where(negative, before, 0), axis=1))
        return mean_over(precision, positive)
