"""ArcFace: softmax cross-entropy with an additive angular margin, also with sub-centres."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from afa.bounds import bounded
from afa.losses.base import (
    Labels,
    Loss,
    PRNGKey,
    Proxies,
    Result,
    Rows,
    State,
    cross_entropy,
    initial_centres,
    unit,
)


@dataclasses.dataclass(frozen=True)
class ArcFace(Loss):
    """ArcFace (Deng et al. 2019, equation 3): adds the margin m to the angle a between a descriptor
    and the proxy of its class.

    cos(a + m) = cos a cos m - sin a sin m. For a > pi - m, where cos(a + m) increases with a, it
    is replaced by cos a - m sin m, as in the authors' code. arccos is avoided because its gradient
    is infinite at 1.

    With K > 1 centres (Deng et al. 2020, "Sub-center ArcFace"), cos a is the largest cosine to the
    K centres of the class, for every class. The centres are parameters of the loss, `centres` of
    shape (C, K, d); the class head is then trained by the normalised softmax, as for losses without
    proxies.
    """

    name: str = "arcface"
    scale: float = bounded(64.0, above=0)
    """s, factor on the cosine (published: 64)."""
    margin: float = bounded(0.5, least=0, below=np.pi)
    """m, in radians (published: 0.5)."""
    centres: int = bounded(1, least=1)
    """K, centres per class (published: 1; with sub-centres 3)."""

    @property
    def uses_proxies(self) -> bool:
        return self.centres == 1

    @property
    def posterior_temperature(self) -> float:
        return 1 / self.scale if self.uses_proxies else super().posterior_temperature

    def init(self, key: PRNGKey, classes: int, dim: int, rows: int) -> State:
        if self.uses_proxies:
            return State()
        return State(params={"centres": initial_centres(key, classes, self.centres, dim)})

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        if self.uses_proxies:
            cosine = x @ proxies.T
        else:
            cosine = jnp.max(jnp.einsum("nd,ckd->nck", x, unit(state.params["centres"])), axis=2)
        m = self.margin
        sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosine), 0) + 1e-9)
        shifted = cosine * jnp.cos(m) - sine * jnp.sin(m)
        shifted = jnp.where(cosine > -jnp.cos(m), shifted, cosine - m * jnp.sin(m))
        is_own = jax.nn.one_hot(y, len(proxies), dtype=bool)
        return cross_entropy(self.scale * jnp.where(is_own, shifted, cosine), y), state
