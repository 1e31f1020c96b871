"""Cross-batch memory (XBM): contrastive loss against descriptors of previous steps."""

import dataclasses

import jax.numpy as jnp

from afa.bounds import bounded
from afa.losses.base import Labels, Loss, PRNGKey, Proxies, Result, Rows, State, pairs
from afa.losses.contrastive import contrastive


@dataclasses.dataclass(frozen=True)
class CrossBatchMemory(Loss):
    """Contrastive loss with a cross-batch memory (Wang et al. 2020, "Cross-batch memory for
    embedding learning", section 3):

    contrastive(batch, batch) + weight contrastive(batch, memory), with
    contrastive = mean_P (1 - s) + mean_N max(0, s - m) over the negatives that violate the margin.

    The memory is a queue of the last descriptors and their labels, without gradients. A step
    compares with the memory from before the step, because the first term has the pairs within the
    batch. Empty entries have the label -1 and form no pairs.
    """

    name: str = "cross_batch_memory"
    size: int = bounded(8192, above=0)
    """Descriptors in the memory (published: 8192, default of the authors' code; larger for larger
    sets, but not larger than the training set)."""
    margin: float = bounded(0.5, least=-1, most=1)
    """m, upper bound on the cosine of negatives (published: 0.5)."""
    weight: float = bounded(1.0, least=0)
    """Weight of the memory term (published: 1)."""
    warmup: int = bounded(0, least=0)
    """First steps that do not enter the memory (published: 1000 of 35,000)."""

    def init(self, key: PRNGKey, classes: int, dim: int, rows: int) -> State:
        memory = {
            "x": jnp.zeros((self.size, dim)),
            "y": jnp.full((self.size,), -1, jnp.int32),
            "count": jnp.zeros((), jnp.int32),  # steps so far
        }
        return State(memory=memory)

    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        old = state.memory
        loss = contrastive(x @ x.T, *pairs(y), self.margin)
        same, filled = y[:, None] == old["y"][None, :], old["y"][None, :] >= 0
        loss += self.weight * contrastive(x @ old["x"].T, same, ~same & filled, self.margin)
        label = jnp.where(old["count"] >= self.warmup, y, -1)
        kept = {
            "x": jnp.concatenate([x, old["x"]])[: self.size],
            "y": jnp.concatenate([label, old["y"]])[: self.size],
            "count": old["count"] + 1,
        }
        return loss, State(memory=kept)
