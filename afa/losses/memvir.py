"""MemVir: normalised softmax with classes of previous steps."""

import dataclasses

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
    mean_over,
    row_cross_entropy,
)


@dataclasses.dataclass(frozen=True)
class MemVir(Loss):
    """MemVir (Ko et al. 2021) on the normalised softmax.

    The descriptors and proxies of the N steps M + 1, 2 (M + 1), ..., N (M + 1) steps ago, without
    gradients, are further rows and further classes: class c of each step is a class of its own. The
    loss is the cross-entropy of s x . p, the mean over all rows. Steps that are not in the memory
    yet are left out, so the number of classes grows slowly.

    The memory of a descriptor block has N (M + 1) (C + n) d numbers for n descriptors of C classes,
    and a step compares (N + 1) n rows with (N + 1) C proxies: with many classes N has to be small.
    """

    name: str = "memvir"
    scale: float = bounded(23.0, above=0)
    """s, factor on the cosine (published: 23, authors' code)."""
    steps: int = bounded(45, above=0)
    """N, previous steps whose classes are added (published: 45 for the normalised softmax on Cars,
    authors' code)."""
    gap: int = bounded(10, least=0)
    """M, steps left out between two of them (published: 10, as above)."""
    warmup: int = bounded(0, least=0)
    """First steps that do not enter the memory (published: 40 of 2,000 epochs)."""

    @property
    def uses_proxies(self) -> bool:
        return True

    @property
    def posterior_temperature(self) -> float:
        return 1 / self.scale

    def init(self, key: PRNGKey, classes: int, dim: int, rows: int) -> State:
        slots = self.steps * (self.gap + 1)
        memory = {
            "x": jnp.zeros((slots, rows, dim)),
            "y": jnp.zeros((slots, rows), jnp.int32),
            "proxies": jnp.zeros((slots, classes, dim)),
            "count": jnp.zeros((), jnp.int32),  # steps so far
        }
        return State(memory=memory)

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        memory, (classes, dim) = state.memory, proxies.shape
        slots = len(memory["y"])
        stored = jnp.maximum(memory["count"] - self.warmup, 0)
        order = 1 + jnp.arange(self.steps)
        ages = (self.gap + 1) * order
        chosen, filled = (stored - ages) % slots, ages <= stored
        old = memory["x"][chosen].reshape(-1, dim)
        targets = jnp.concatenate([y, (classes * order[:, None] + memory["y"][chosen]).ravel()])
        virtual = memory["proxies"][chosen].reshape(-1, dim)
        # Four products, because the largest needs no gradient.
        logits = self.scale * jnp.block(
            [[x @ proxies.T, x @ virtual.T], [old @ proxies.T, old @ virtual.T]]
        )
        is_class = jnp.repeat(jnp.append(True, filled), classes)
        losses = row_cross_entropy(jnp.where(is_class, logits, FAR), targets)
        loss = mean_over(losses, jnp.repeat(jnp.append(True, filled), len(y)))
        # Replaces the oldest step. During the warm-up `stored` stays 0, so nothing is filled.
        kept = {
            name: memory[name].at[stored % slots].set(new)
            for name, new in {"x": x, "y": y, "proxies": proxies}.items()
        }
        return loss, State(memory=kept | {"count": memory["count"] + 1})
