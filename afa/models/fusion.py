"""Fusion: the descriptors of one image become one unit vector, so that any index can search it.

The vector is the concatenation of unit blocks, block i scaled by sqrt(w_i g_i): w_i is the weight
of the block (chosen on validation classes), g_i in [0, 1] the gate of this image. With gates of
one, the dot product of two fused vectors is the weighted mean of the blocks' similarities.
"""

from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers

Blocks = Mapping[str, Float[Array, "b _"]]
Gate = Literal["fixed", "learned", "verdict"]


def fuse(
    blocks: Blocks,
    weights: Mapping[str, float | Float[Array, ""]],
    gates: Mapping[str, Float[Array, "b"]] | None = None,
) -> Float[Array, "b d"]:
    """One unit vector an image: sqrt(weight * gate) times every block named in `weights`."""
    parts = []
    for name, weight in weights.items():
        gate = 1.0 if gates is None or name not in gates else gates[name][:, None]
        # The epsilon keeps the gradient of the root finite where a gate closes.
        parts.append(jnp.sqrt(weight * gate + 1e-12) * blocks[name])
    return layers.l2_normalise(jnp.concatenate(parts, axis=-1))


class RestorationGate(nn.Module):
    """How far to trust the restored image x^ beside the image x itself, in [0, 1].

    fixed: 1. verdict: sigmoid(D(x^) - D(x)): the discriminator finds x^ closer to the ideal than x.
    learned: a linear function of both global descriptors, trained with the metric loss.
    """

    kind: Gate

    @nn.compact
    def __call__(
        self,
        original: Float[Array, "b d"],
        restored: Float[Array, "b d"],
        logit_original: Float[Array, "b"],
        logit_restored: Float[Array, "b"],
    ) -> Float[Array, "b"]:
        if self.kind == "fixed":
            return jnp.ones(original.shape[0])
        if self.kind == "verdict":
            return nn.sigmoid(logit_restored - logit_original)
        both = jnp.concatenate([original, restored, original * restored], axis=-1)
        return nn.sigmoid(nn.Dense(1, name="linear", kernel_init=nn.initializers.zeros)(both)[:, 0])
