"""Custom losses, as a user would add them: one with parameters, one with random numbers."""

import dataclasses

import jax
import jax.numpy as jnp

from afa.losses.base import (
    Labels,
    Loss,
    PRNGKey,
    Proxies,
    Result,
    Rows,
    State,
    cross_entropy,
)


@dataclasses.dataclass(frozen=True)
class TwoCentres(Loss):
    """Softmax over the nearer of two centres per class, which are parameters of the loss."""

    name: str = "two_centres"
    scale: float = 8.0
    """Factor on the cosine."""

    def init(self, key: PRNGKey, classes: int, dim: int, rows: int) -> State:
        return State(params={"centres": jax.random.normal(key, (2, classes, dim))})

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        centres = state.params["centres"]
        centres /= jnp.linalg.norm(centres, axis=-1, keepdims=True)
        cosine = jnp.max(jnp.einsum("nd,kcd->knc", x, centres), axis=0)
        return cross_entropy(self.scale * cosine, y), state


@dataclasses.dataclass(frozen=True)
class RandomWeights(Loss):
    """Softmax with a random weight for every image."""

    name: str = "random_weights"

    @property
    def uses_proxies(self) -> bool:
        return True

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        losses = -jax.nn.log_softmax(x @ proxies.T)[jnp.arange(len(y)), y]
        return jnp.mean(losses * jax.random.uniform(key, y.shape)), state
