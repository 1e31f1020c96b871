"""Metric loss of a training step, over the global, local and fused descriptors."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from afa.losses.base import Labels, Loss, PRNGKey, Proxies, Rows, Scalar, State
from afa.losses.norm_softmax import norm_softmax


def _weights(loss: Loss) -> dict[str, float]:
    return {"global": 1.0, "local": loss.local_weight, "fused": loss.fused_weight}


def init(
    loss: Loss, key: PRNGKey, classes: int, dims: Mapping[str, int], rows: int
) -> dict[str, State]:
    """Returns the initial state of the loss for each descriptor block of positive weight.

    Args:
      classes: number of training classes.
      dims: dimension of each block: "global", "local", "fused".
      rows: number of descriptors of the global batch.
    """
    blocks = [name for name, weight in _weights(loss).items() if weight > 0]
    keys = jax.random.split(key, len(blocks))
    return {
        name: loss.init(k, classes, dims[name], rows) for name, k in zip(blocks, keys, strict=True)
    }


def metric_loss(
    loss: Loss,
    states: Mapping[str, State],
    blocks: Mapping[str, Rows],
    labels: Labels,
    proxies: Mapping[str, Proxies],
    key: PRNGKey,
) -> tuple[Scalar, dict[str, State]]:
    """Returns the weighted mean of the loss over the descriptor blocks, and the next states.

    For a loss without proxies, a normalised softmax trains the class head, which gives the class
    posterior. It sees the descriptors through a stop-gradient, so it does not train F.

    Args:
      states: block -> state, from `init` or the previous step.
      blocks: block -> unit descriptors of the global batch.
      labels: training class indices.
      proxies: block -> unit proxies, the rows of the class head.
      key: for random numbers of the loss; every block gets one of its own.
    """
    weights, new_states = _weights(loss), {}
    keys = dict(zip(weights, jax.random.split(key, len(weights)), strict=True))
    total = jnp.zeros(())
    for name, weight in weights.items():
        if weight > 0:
            value, new_states[name] = loss.apply(
                states[name], blocks[name], labels, proxies[name], keys[name]
            )
            total += weight * value
        if not loss.uses_proxies:
            detached = jax.lax.stop_gradient(blocks[name])
            total += norm_softmax(detached, labels, proxies[name], loss.posterior_temperature)
    return total / sum(weights.values()), new_states
