"""Lifted structured loss: each positive pair against all negatives of both of its samples."""

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
    euclidean,
    mean_over,
    pairs,
)


@dataclasses.dataclass(frozen=True)
class LiftedStructure(Loss):
    """Lifted structured loss (Song et al. 2016, equation 4, the smooth form), on unit vectors:

    1/2 mean over positive pairs (i, j) of max(0, J_ij)^2,
    J_ij = D_ij + log(sum_{k in N(i)} exp(m - D_ik) + sum_{k in N(j)} exp(m - D_jk)),

    with the Euclidean distance D (`afa.losses.base.euclidean`; not squared). The paper has
    descriptors of any length.
    """

    name: str = "lifted_structure"
    margin: float = bounded(1.0, least=0)
    """m, on the distance (published: 1)."""

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        distance = euclidean(x @ x.T)
        positive, negative = pairs(y)
        far = jax.nn.logsumexp(jnp.where(negative, self.margin - distance, FAR), axis=1)
        bound = distance + jnp.logaddexp(far[:, None], far[None, :])
        return 0.5 * mean_over(jnp.square(jax.nn.relu(bound)), positive), state
