"""CosFace: softmax cross-entropy with an additive margin on the cosine."""

import dataclasses

import jax

from afa.bounds import bounded
from afa.losses.base import Labels, Loss, PRNGKey, Proxies, Result, Rows, State, cross_entropy


@dataclasses.dataclass(frozen=True)
class CosFace(Loss):
    """CosFace (Wang et al. 2018, "CosFace: Large margin cosine loss", equation 4):

    mean_i -log softmax_c(s (x_i . p_c - m [c = y_i]))[y_i].
    """

    name: str = "cosface"
    scale: float = bounded(64.0, above=0)
    """s, factor on the cosine (published: 64)."""
    margin: float = bounded(0.35, least=0, most=2)
    """m, on the cosine (published: 0.35)."""

    @property
    def uses_proxies(self) -> bool:
        return True

    @property
    def posterior_temperature(self) -> float:
        return 1 / self.scale

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        is_own = jax.nn.one_hot(y, len(proxies))
        return cross_entropy(self.scale * (x @ proxies.T - self.margin * is_own), y), state
