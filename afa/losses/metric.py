"""The metric loss of a step: the chosen loss over the global, local and fused descriptors."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from afa.losses.base import Labels, Loss, Proxies, Rows, Scalar, State
from afa.losses.norm_softmax import norm_softmax


def _weights(loss: Loss) -> dict[str, float]:
    return {"global": 1.0, "local": loss.local_weight, "fused": loss.fused_weight}


def init(
    loss: Loss, key: Key[Array, ""], classes: int, dims: Mapping[str, int]
) -> dict[str, State]:
    """The loss's state for every descriptor block that it weighs above 0.

    Args:
      classes: number of training classes.
      dims: length of the descriptors of every block: "global", "local", "fused".
    """
    blocks = [name for name, weight in _weights(loss).items() if weight > 0]
    keys = jax.random.split(key, len(blocks))
    return {name: loss.init(k, classes, dims[name]) for name, k in zip(blocks, keys, strict=True)}


def metric_loss(
    loss: Loss,
    states: Mapping[str, State],
    blocks: Mapping[str, Rows],
    labels: Labels,
    proxies: Mapping[str, Proxies],
) -> tuple[Scalar, dict[str, State]]:
    """The chosen loss over the descriptor blocks, weighted, and the next state of each.

    A loss without proxies leaves the class head to normalised softmax on descriptors that pass no
    gradient on: the posterior is part of the method.

    Args:
      states: block -> state, of `init`.
      blocks: block -> unit descriptors of the global batch.
      labels: their training classes.
      proxies: block -> unit rows of the class head.
    """
    weights, after = _weights(loss), {}
    total = jnp.zeros(())
    for name, weight in weights.items():
        if weight > 0:
            value, after[name] = loss.apply(states[name], blocks[name], labels, proxies[name])
            total += weight * value
        if not loss.uses_proxies:
            fixed = jax.lax.stop_gradient(blocks[name])
            total += norm_softmax(fixed, labels, proxies[name], loss.posterior_temperature)
    return total / sum(weights.values()), after
