"""Proxy-NCA++: softmax cross-entropy over squared distances to the proxies."""

import dataclasses

from afa.bounds import bounded
from afa.losses.base import Labels, Loss, PRNGKey, Proxies, Result, Rows, State
from afa.losses.norm_softmax import norm_softmax


@dataclasses.dataclass(frozen=True)
class ProxyNCA(Loss):
    """Proxy-NCA++ (Teh et al. 2020): mean_i -log softmax_c(-|x_i - p_c|^2 / T)[y_i].

    |x - p|^2 = 2 - 2 x . p for unit vectors, so it is the normalised softmax of temperature T / 2.
    """

    name: str = "proxy_nca"
    temperature: float = bounded(1 / 9, above=0)
    """T, divides the squared distance (published: 1/9)."""

    @property
    def uses_proxies(self) -> bool:
        return True

    @property
    def posterior_temperature(self) -> float:
        return self.temperature / 2

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        return norm_softmax(x, y, proxies, self.temperature / 2), state
