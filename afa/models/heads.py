"""Pooling heads: feature maps to the global and the local descriptor of an image."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from afa.models import layers


class LocalFeatures(NamedTuple):
    """The strongest local features of images, in descending order of attention.

    Attributes:
      strength: attention; all positions of a map sum to 1.
      position: centre (x, y), as fractions of the width and height of the map.
      descriptor: unit vectors.
    """

    strength: Float[Array | np.ndarray, "b p"]
    position: Float[Array | np.ndarray, "b p 2"]
    descriptor: Float[Array | np.ndarray, "b p d"]


class GlobalHead(nn.Module):
    """Global descriptor of a map, or of a vector if the network pools itself.

    Generalised-mean (GeM) pooling (Radenovic et al. 2018, equation 3), layer normalisation without
    scale and bias (Zhai & Wu 2019, section 3.2), linear layer, L2 normalisation.

    GeM: f = (mean_i max(x_i, eps)^p)^(1/p), computed in float32; p is learned.
    """

    dim: int
    power: float = 3.0

    @nn.compact
    def __call__(self, x: Float[Array, "b *places c"]) -> Float[Array, "b {self.dim}"]:
        pooled = x.astype(jnp.float32)
        if x.ndim == 4:
            p = self.param("power", nn.initializers.constant(self.power), ())
            # The lower bound keeps the gradient of x^p finite for maps of zeros.
            pooled = jnp.mean(jnp.maximum(pooled, 1e-4) ** p, axis=(1, 2)) ** (1 / p)
        # Pooled maps are positive with a large common mean, which would make all cosines similar.
        centred = nn.LayerNorm(use_scale=False, use_bias=False, name="norm")(pooled)
        return layers.l2_normalise(nn.Dense(self.dim, name="linear")(centred))


class LocalHead(nn.Module):
    """Attention-pooled local descriptors of the mid map (after DELF, Noh et al. 2017).

    Each position i of the map has a unit descriptor d_i and an attention a_i = softplus(x_i) / sum.
    The local descriptor is the L2-normalised sum_i a_i d_i. Re-ranking uses the pairs (a_i, d_i).
    """

    dim: int
    dtype: layers.Dtype = jnp.float32

    def setup(self) -> None:
        self.describe = layers.conv(self.dim, 1, dtype=self.dtype, use_bias=True)
        self.attend = layers.conv(1, 1, dtype=self.dtype, use_bias=True)

    def local_features(
        self, mid: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b p"], Float[Array, "b p d"]]:
        """Returns the attention (with sum 1) and the unit descriptor of every map position."""
        batch = mid.shape[0]
        x = self.attend(mid).astype(jnp.float32).reshape(batch, -1)
        # In log space, where softplus(x) ~ e^x for small x. Otherwise all attentions could round to
        # 0, and the descriptor would have length 0.
        log_attention = jnp.where(x < -15, x, jnp.log(nn.softplus(jnp.maximum(x, -15))))
        attention = nn.softmax(log_attention)
        descriptors = layers.l2_normalise(self.describe(mid).reshape(batch, -1, self.dim))
        return attention, descriptors

    def strongest(self, mid: Float[Array, "b h w c"], count: int) -> LocalFeatures:
        """Returns the `count` local features of highest attention; all if the map has fewer."""
        attention, descriptors = self.local_features(mid)
        _, height, width, _ = mid.shape
        strength, index = lax.top_k(attention, min(count, height * width))
        centre = jnp.stack([(index % width + 0.5) / width, (index // width + 0.5) / height], -1)
        return LocalFeatures(
            strength, centre, jnp.take_along_axis(descriptors, index[..., None], axis=1)
        )

    def __call__(self, mid: Float[Array, "b h w c"]) -> Float[Array, "b {self.dim}"]:
        attention, descriptors = self.local_features(mid)
        return layers.l2_normalise(jnp.einsum("bp,bpd->bd", attention, descriptors))
