"""Contrastive loss on cosine similarities."""

import dataclasses

import jax
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
class Contrastive(Loss):
    """Contrastive loss (Hadsell et al. 2006) on cosines: mean_P (1 - s) + mean_N max(0, s - m)
    over the negatives that violate the margin."""

    name: str = "contrastive"
    margin: float = bounded(0.5, least=-1, most=1)
    """m, upper bound on the cosine of negatives (0.5: Wang et al. 2020, cross-batch memory,
    authors' code)."""

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        return contrastive(x @ x.T, *pairs(y), self.margin), state


def contrastive(
    s: Float[Array, "n m"],
    positive: Bool[Array, "n m"],
    negative: Bool[Array, "n m"],
    margin: float,
) -> Scalar:
    """mean_P (1 - s) + mean_N max(0, s - margin) over the negatives that violate the margin."""
    excess = jax.nn.relu(s - margin)
    return mean_over(1 - s, positive) + mean_over(excess, negative & (excess > 0))
