"""Normalised softmax: cross-entropy over cosine similarities to the proxies."""

import dataclasses

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
)


@dataclasses.dataclass(frozen=True)
class NormSoftmax(Loss):
    """Normalised softmax (Zhai & Wu 2019, "Classification is a strong baseline for deep metric
    learning", section 3.1): mean_i -log softmax_c(x_i . p_c / T)[y_i]."""

    name: str = "norm_softmax"
    temperature: float = bounded(0.05, above=0)
    """T, divides the cosine (published: 0.05)."""

    @property
    def uses_proxies(self) -> bool:
        return True

    @property
    def posterior_temperature(self) -> float:
        return self.temperature

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        return norm_softmax(x, y, proxies, self.temperature), state


def norm_softmax(x: Rows, y: Labels, proxies: Proxies, temperature: float) -> Scalar:
    """mean_i -log softmax_c(x_i . p_c / T)[y_i]."""
    return cross_entropy(x @ proxies.T / temperature, y)
