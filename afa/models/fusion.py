"""Fusion of the descriptors of an image into one unit vector, which any index can search.

The vector concatenates unit blocks, block i scaled by sqrt(w_i g_i), where w_i is the weight of the
block (chosen on validation classes) and g_i in [0, 1] the gate of this image. If all gates are 1,
the dot product of two fused vectors is the weighted mean of the cosine similarities of the blocks.

A gate that is not fixed belongs to the query x alone: its restored view x^ takes the share g and x
the rest, and a gallery image y has F(y) in both blocks. The dot product is then, up to a factor of
each image, w_x sqrt(1 - g) s(x, y) + w_r sqrt(g) s(x^, y): the gate can close either.
"""

from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers

Blocks = Mapping[str, Float[Array, "b _"]]
Gate = Literal["fixed", "learned", "verdict"]
Role = Literal["query", "gallery"]  # of an image in a search


def fuse(
    blocks: Blocks,
    weights: Mapping[str, float | Float[Array, ""]],
    gates: Mapping[str, Float[Array, "b"]] | None = None,
    role: Role = "query",
) -> Float[Array, "b d"]:
    """Fuses descriptor blocks into one unit vector per image.

    Args:
      blocks: block name -> unit descriptors.
      weights: block name -> weight; blocks without a weight are not used.
      gates: of the query's blocks (`shares`), 1 by default; "global" among them says that the gate
        is not fixed, and that a gallery image has its global descriptor in both blocks.
      role: of the images.
    """
    gates = {} if gates is None else gates
    if role == "gallery" and "global" in gates:
        blocks, gates = {**blocks, "restored": blocks["global"]}, {}
    parts = []
    for name, weight in weights.items():
        gate = gates[name][:, None] if name in gates else 1.0
        # The epsilon keeps the gradient of the square root finite at a gate of 0.
        parts.append(jnp.sqrt(weight * gate + 1e-12) * blocks[name])
    return layers.l2_normalise(jnp.concatenate(parts, axis=-1))


def shares(kind: Gate, gate: Float[Array, "b"]) -> dict[str, Float[Array, "b"]]:
    """Gates of a query's blocks: x^ takes the share of the gate, and x the rest of it unless the
    gate is fixed."""
    return {"restored": gate} if kind == "fixed" else {"global": 1 - gate, "restored": gate}


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
