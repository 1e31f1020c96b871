"""What every metric loss is: a frozen dataclass with the published settings and two functions.

Symbols of all losses: x_i unit descriptor with label y_i, p_c unit proxy of class c,
s_ij = x_i . x_j the cosine, P(i) the other rows of the same class, N(i) the rows of other classes.

A loss of your own is one file with one subclass of `Loss` and one line of `afa.losses.LOSSES`.
"""

import abc
import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from afa.bounds import bounded

Rows = Float[Array, "n d"]
Labels = Int[Array, "n"]
Proxies = Float[Array, "c d"]
Scalar = Float[Array, ""]

FAR = -1e9  # stands for "not a candidate" in a maximum


class State(flax.struct.PyTreeNode):
    """What a loss keeps from step to step, for one descriptor block. Dictionaries of arrays, so
    that checkpoints can hold them.

    Attributes:
      params: learned with F's optimiser settings, without weight decay but on leaves named
        "kernel".
      memory: no gradient reaches it; a step replaces it by what `apply` returns.
    """

    params: PyTree = flax.struct.field(default_factory=dict)
    memory: PyTree = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Loss(abc.ABC):
    """A metric loss and its settings.

    Class attributes:
      uses_proxies: the loss trains the class head. Otherwise the class head, which also gives the
        posterior, is trained beside it (`afa.losses.metric`).
    """

    uses_proxies: ClassVar[bool] = False

    name: str = ""
    """Metric loss; its settings follow, and those of another with `--loss.name=NAME --help`."""
    local_weight: float = bounded(0.5, least=0)
    """Weight of the loss of the local descriptor beside the global one (weight 1)."""
    fused_weight: float = bounded(0.5, least=0)
    """Weight of the loss of the fused (global, local) descriptor."""

    @property
    def posterior_temperature(self) -> float:
        """Divides the cosines to the class head in the posterior; 0.05 is that of normalised
        softmax, which trains the class head of a loss without proxies."""
        return 0.05

    def init(self, key: Key[Array, ""], classes: int, dim: int) -> State:
        """The state before the first step; empty unless a loss has one.

        Args:
          key: for random first values; another for every descriptor block.
          classes: number of training classes.
          dim: length of the descriptors.
        """
        return State()

    @abc.abstractmethod
    def apply(self, state: State, x: Rows, y: Labels, proxies: Proxies) -> tuple[Scalar, State]:
        """The loss of a global batch, the same on every device, and the next state.

        Args:
          state: as `init` or the step before made it.
          x: unit descriptors of all devices' rows.
          y: their training classes, 0 to c - 1.
          proxies: unit rows of the class head, one a class. Gradients reach them.
        """


def pairs(labels: Labels) -> tuple[Bool[Array, "n n"], Bool[Array, "n n"]]:
    """Masks of P(i) and N(i)."""
    same = labels[:, None] == labels[None, :]
    return same & ~jnp.eye(len(labels), dtype=bool), ~same


def mean_over(values: Float[Array, "..."], chosen: Bool[Array, "..."]) -> Scalar:
    """Mean of the chosen values; 0 when there are none."""
    return jnp.sum(jnp.where(chosen, values, 0)) / jnp.maximum(jnp.sum(chosen), 1)


def log1p_sum(
    exponents: Float[Array, "..."], chosen: Bool[Array, "..."], axis: int
) -> Float[Array, "..."]:
    """log(1 + sum exp(exponent)) of the chosen entries along an axis, without overflow."""
    terms = jnp.where(chosen, exponents, FAR)
    zero = jnp.zeros_like(jax.lax.slice_in_dim(terms, 0, 1, axis=axis))
    return jax.nn.logsumexp(jnp.concatenate([zero, terms], axis), axis=axis)


def cross_entropy(logits: Float[Array, "n c"], labels: Labels) -> Scalar:
    """mean_i -log softmax(logits_i)[y_i]."""
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)
