"""Fusion of the descriptors of an image into one unit vector, which any index can search.

The vector concatenates unit blocks, block i scaled by sqrt(w_i g_i), where w_i is the weight of the
block (chosen on validation classes) and g_i in [0, 1] the gate of this image. If all gates are 1,
the dot product of two fused vectors is the weighted mean of the cosine similarities of the blocks.
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
    """Fuses descriptor blocks into one unit vector per image.

    Args:
      blocks: block name -> unit descriptors.
      weights: block name -> weight; blocks without a weight are not used.
      gates: block name -> gate of each image; 1 by default.
    """
    parts = []
    for name, weight in weights.items():
        gate = 1.0 if gates is None or name not in gates else gates[name][:, None]
        # The epsilon keeps the gradient of the square root finite at a gate of 0.
        parts.append(jnp.sqrt(weight * gate + 1e-12) * blocks[name])
    return layers.l2_normalise(jnp.concatenate(parts, axis=-1))


class RestorationGate(nn.Module):
    """Gate of the block of the restored image x^, in [0, 1].

    Kinds:
      fixed: 1.
      verdict: sigmoid(D(x^) - D(x)), from the discriminator logits of x^ and of the image x.
      learned: sigmoid of a linear function of both global descriptors, trained by the metric loss.
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
