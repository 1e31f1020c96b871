"""Base class of the metric losses: a frozen dataclass of settings with `init` and `apply`.

Notation: x_i unit descriptor with label y_i, p_c unit proxy of class c, s_ij = x_i . x_j the cosine
similarity, P(i) the other samples of the same class, N(i) the samples of other classes.

To add a loss, write a subclass of `Loss` in a new file and add it to `afa.losses.LOSSES`.
"""

import abc
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from afa.bounds import bounded

Rows = Float[Array, "n d"]
Labels = Int[Array, "n"]
Proxies = Float[Array, "c d"]
Scalar = Float[Array, ""]
PRNGKey = Key[Array, ""]

FAR = -1e9  # masks entries that are not candidates of a maximum


class State(flax.struct.PyTreeNode):
    """State of a loss for one descriptor block. Nested dictionaries of arrays, for checkpointing.

    Attributes:
      params: trained with the optimiser settings of F; weight decay applies only to leaves named
        "kernel".
      memory: not trained; each step replaces it by the value that `apply` returns.
    """

    params: PyTree = flax.struct.field(default_factory=dict)
    memory: PyTree = flax.struct.field(default_factory=dict)


Result = tuple[Scalar, State]


@dataclasses.dataclass(frozen=True)
class Loss(abc.ABC):
    """A metric loss and its settings."""

    name: str = ""
    """Metric loss; its settings follow. `--loss.name=NAME --help` shows those of another loss."""
    local_weight: float = bounded(0.5, least=0)
    """Weight of the loss on the local descriptor; the global descriptor has weight 1."""
    fused_weight: float = bounded(0.5, least=0)
    """Weight of the loss on the fused (global and local) descriptor."""

    @property
    def uses_proxies(self) -> bool:
        """Whether the loss trains the class head. If not, a normalised softmax trains it for the
        class posterior (`afa.losses.metric`)."""
        return False

    @property
    def posterior_temperature(self) -> float:
        """Temperature of the class posterior. 0.05 is that of the normalised softmax, which trains
        the class head for losses without proxies."""
        return 0.05

    def init(self, key: PRNGKey, classes: int, dim: int, rows: int) -> State:
        """Returns the initial state; empty by default.

        A memory has arrays of fixed shape that mark the entries not yet filled.

        Args:
          key: for random initial values; different for each descriptor block.
          classes: number of training classes.
          dim: descriptor dimension.
          rows: number of descriptors of the global batch.
        """
        return State()

    @abc.abstractmethod
    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies, key: PRNGKey) -> Result:
        """Returns the loss of the global batch and the next state, the same on every device.

        Args:
          state: from `init` or the previous step.
          x: unit descriptors of the global batch, gathered from all devices.
          y: training class indices, 0 to c - 1.
          proxies: unit proxy of each class, the rows of the class head. They receive gradients.
          key: for random numbers; the same on every device, different for each descriptor block and
            step.
        """


def pairs(labels: Labels) -> tuple[Bool[Array, "n n"], Bool[Array, "n n"]]:
    """Masks of P(i) and N(i)."""
    same = labels[:, None] == labels[None, :]
    return same & ~jnp.eye(len(labels), dtype=bool), ~same


def mean_over(values: Float[Array, "..."], selected: Bool[Array, "..."]) -> Scalar:
    """Mean of the selected values; 0 if none is selected."""
    return jnp.sum(jnp.where(selected, values, 0)) / jnp.maximum(jnp.sum(selected), 1)


def log1p_sum(
    exponents: Float[Array, "..."], selected: Bool[Array, "..."], axis: int
) -> Float[Array, "..."]:
    """log(1 + sum exp(exponent)) of the selected entries along an axis, without overflow."""
    terms = jnp.where(selected, exponents, FAR)
    zero = jnp.zeros_like(jax.lax.slice_in_dim(terms, 0, 1, axis=axis))
    return jax.nn.logsumexp(jnp.concatenate([zero, terms], axis), axis=axis)


def row_cross_entropy(logits: Float[Array, "n c"], labels: Labels) -> Float[Array, "n"]:
    """-log softmax(logits_i)[y_i] of each row."""
    target = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - target


def cross_entropy(logits: Float[Array, "n c"], labels: Labels) -> Scalar:
    """mean_i -log softmax(logits_i)[y_i]."""
    return jnp.mean(row_cross_entropy(logits, labels))


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """L2 normalisation; the epsilon keeps the gradient finite at 0."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def initial_centres(
    key: PRNGKey, classes: int, count: int, dim: int
) -> Float[Array, "classes count dim"]:
    """Returns initial values of several centres per class, of length about 1 as the class heads."""
    return jax.random.normal(key, (classes, count, dim)) * dim**-0.5


def euclidean(cosine: Float[Array, "..."]) -> Float[Array, "..."]:
    """Euclidean distance of unit vectors, sqrt(2 - 2 cosine + 1e-5).

    The gradient of the root is infinite at 0 without the constant.
    """
    return jnp.sqrt(jnp.maximum(2 - 2 * cosine, 0) + 1e-5)
