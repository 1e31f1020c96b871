"""Proxy-Anchor: compares every proxy, as an anchor, with the whole batch."""

import dataclasses

import jax

from afa.bounds import bounded
from afa.losses.base import (
    Labels,
    Loss,
    PRNGKey,
    Proxies,
    Result,
    Rows,
    State,
    log1p_sum,
    mean_over,
)


@dataclasses.dataclass(frozen=True)
class ProxyAnchor(Loss):
    """Proxy-Anchor (Kim et al. 2020, equation 4), a = scale, d = margin:

    mean over proxies with positives of log(1 + sum_+ exp(-a(x.p - d)))
    + mean over all proxies of log(1 + sum_- exp(a(x.p + d))).
    """

    name: str = "proxy_anchor"
    scale: float = bounded(32.0, above=0)
    """alpha, factor on the cosine (published: 32)."""
    margin: float = bounded(0.1, least=0, most=2)
    """delta, on the cosine (published: 0.1)."""

    @property
    def uses_proxies(self) -> bool:
        return True

    @property
    def posterior_temperature(self) -> float:
        return 1 / self.scale

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        cosine, a, d = x @ proxies.T, self.scale, self.margin
        is_own = jax.nn.one_hot(y, len(proxies), dtype=bool)
        positive = log1p_sum(-a * (cosine - d), is_own, axis=0)
        negative = log1p_sum(a * (cosine + d), ~is_own, axis=0)
        return mean_over(positive, is_own.any(0)) + negative.mean(), state
