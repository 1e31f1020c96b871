"""SoftTriple: softmax cross-entropy over several centres per class."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
    cross_entropy,
    euclidean,
    initial_centres,
    unit,
)


@dataclasses.dataclass(frozen=True)
class SoftTriple(Loss):
    """SoftTriple (Qian et al. 2019, section 3), with K unit centres w_c1, ..., w_cK per class:

    S_ic = sum_k softmax_k(x_i . w_ck / gamma) x_i . w_ck,
    mean_i -log softmax_c(lambda (S_ic - delta [c = y_i]))[y_i]
    + tau / (C K (K - 1)) sum_c sum_{j < k} |w_cj - w_ck|.

    The last term, with the distance of `afa.losses.base.euclidean`, merges centres that a class
    does not need. The centres are parameters of the loss, `centres` of shape (C, K, d); the class
    head is trained by the normalised softmax.
    """

    name: str = "soft_triple"
    centres: int = bounded(10, least=1)
    """K, centres per class (published: 10)."""
    gamma: float = bounded(0.1, above=0)
    """Temperature of the softmax over the centres of a class (published: 0.1)."""
    scale: float = bounded(20.0, above=0)
    """lambda, factor on the similarity (published: 20)."""
    tau: float = bounded(0.2, least=0)
    """Weight of the distances between the centres of a class (published: 0.2)."""
    margin: float = bounded(0.01, least=0, most=2)
    """delta, on the similarity (published: 0.01)."""

    def init(self, key: PRNGKey, classes: int, dim: int, rows: int) -> State:
        return State(params={"centres": initial_centres(key, classes, self.centres, dim)})

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        w = unit(state.params["centres"])
        s = jnp.einsum("nd,ckd->nck", x, w)
        similarity = jnp.sum(jax.nn.softmax(s / self.gamma, axis=2) * s, axis=2)
        is_own = jax.nn.one_hot(y, len(w))
        loss = cross_entropy(self.scale * (similarity - self.margin * is_own), y)
        return loss + self.tau * _spread(w), state


def _spread(w: Float[Array, "c k d"]) -> Scalar:
    """sum_c sum_{j < k} |w_cj - w_ck| / (C K (K - 1)): half the mean distance of the centres of a
    class; 0 for one centre."""
    classes, count, _ = w.shape
    first, second = np.triu_indices(count, 1)
    cosine = jnp.sum(w[:, first] * w[:, second], axis=2)
    return jnp.sum(euclidean(cosine)) / max(classes * count * (count - 1), 1)
