"""ArcFace: softmax cross-entropy with an additive angular margin."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from afa.bounds import bounded
from afa.losses.base import Labels, Loss, Proxies, Rows, Scalar, State, cross_entropy


@dataclasses.dataclass(frozen=True)
class ArcFace(Loss):
    """ArcFace (Deng et al. 2019, equation 3): adds the margin m to the angle a between a descriptor
    and the proxy of its class.

    cos(a + m) = cos a cos m - sin a sin m. For a > pi - m, where cos(a + m) increases with a, it
    is replaced by cos a - m sin m, as in the authors' code. arccos is avoided because its gradient
    is infinite at 1.
    """

    uses_proxies: ClassVar[bool] = True

    name: str = "arcface"
    scale: float = bounded(64.0, above=0)
    """s, factor on the cosine (published: 64)."""
    margin: float = bounded(0.5, least=0, below=np.pi)
    """m, in radians (published: 0.5)."""

    @property
    def posterior_temperature(self) -> float:
        return 1 / self.scale

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies) -> tuple[Scalar, State]:
        cosine, m = x @ proxies.T, self.margin
        sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosine), 0) + 1e-9)
        shifted = cosine * jnp.cos(m) - sine * jnp.sin(m)
        shifted = jnp.where(cosine > -jnp.cos(m), shifted, cosine - m * jnp.sin(m))
        is_own = jax.nn.one_hot(y, len(proxies), dtype=bool)
        return cross_entropy(self.scale * jnp.where(is_own, shifted, cosine), y), state
