"""Custom losses, as a user would add them: one with a memory, one with parameters."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from afa.bounds import bounded
from afa.losses.base import Labels, Loss, Proxies, Rows, Scalar, State, cross_entropy, mean_over
from afa.losses.contrastive import Contrastive


@dataclasses.dataclass(frozen=True)
class CrossBatchMemory(Loss):
    """Contrastive loss over the batch and rows of previous steps (Wang et al. 2020)."""

    name: str = "cross_batch_memory"
    size: int = bounded(40, above=0)
    """Number of rows in the memory."""
    margin: float = 0.5
    """Upper bound on the cosine of negatives."""

    def init(self, key: Key[Array, ""], classes: int, dim: int) -> State:
        empty = {"x": jnp.zeros((self.size, dim)), "y": jnp.full((self.size,), -1, jnp.int32)}
        return State(memory=empty)

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies) -> tuple[Scalar, State]:
        old = state.memory
        within, _ = Contrastive(margin=self.margin).apply(State(), x, y, proxies)
        s, same = x @ old["x"].T, y[:, None] == old["y"][None, :]
        excess = jax.nn.relu(s - self.margin)
        across = mean_over(1 - s, same)
        across += mean_over(excess, ~same & (old["y"] >= 0) & (excess > 0))
        kept = {"x": jnp.concatenate([x, old["x"]])[: self.size],
                "y": jnp.concatenate([y, old["y"]])[: self.size]}  # fmt: skip
        return within + across, State(memory=kept)


@dataclasses.dataclass(frozen=True)
class TwoCentres(Loss):
    """Softmax over the nearer of two centres per class, which are parameters of the loss."""

    name: str = "two_centres"
    scale: float = 8.0
    """Factor on the cosine."""

    def init(self, key: Key[Array, ""], classes: int, dim: int) -> State:
        return State(params={"centres": jax.random.normal(key, (2, classes, dim))})

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies) -> tuple[Scalar, State]:
        centres = state.params["centres"]
        centres /= jnp.linalg.norm(centres, axis=-1, keepdims=True)
        cosine = jnp.max(jnp.einsum("nd,kcd->knc", x, centres), axis=0)
        return cross_entropy(self.scale * cosine, y), state
