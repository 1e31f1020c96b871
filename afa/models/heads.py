"""From maps to descriptors: the global view and the local view of an image."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from afa.models import layers


class LocalFeatures(NamedTuple):
    """The strongest places of images, strongest first.

    Attributes:
      strength: attention, as a share of the whole map's.
      position: centre (x, y), as a share of the map's width and height.
      descriptor: unit vectors.
    """

    strength: Float[Array | np.ndarray, "b p"]
    position: Float[Array | np.ndarray, "b p 2"]
    descriptor: Float[Array | np.ndarray, "b p d"]


class GlobalHead(nn.Module):
    """Map (or vector, of a network that pools itself) to descriptor.

    Generalised-mean pooling (Radenovic et al. 2018, equation 3), layer normalisation without
    affine part (Zhai & Wu 2019, section 3.2), linear map, unit length.

    f = (mean_i max(x_i, eps)^p)^(1/p), computed in float32; p is learned.
    """

    dim: int
    power: float = 3.0

    @nn.compact
    def __call__(self, x: Float[Array, "b *places c"]) -> Float[Array, "b {self.dim}"]:
        pooled = x.astype(jnp.float32)
        if x.ndim == 4:
            p = self.param("power", nn.initializers.constant(self.power), ())
            # The floor keeps the gradient of x^p finite where a whole map is zero.
            pooled = jnp.mean(jnp.maximum(pooled, 1e-4) ** p, axis=(1, 2)) ** (1 / p)
        # Pooled maps are positive and share a large mean, which would make all cosines alike.
        centred = nn.LayerNorm(use_scale=False, use_bias=False, name="norm")(pooled)
        return layers.l2_normalise(nn.Dense(self.dim, name="linear")(centred))


class LocalHead(nn.Module):
    """Attention-pooled local descriptors of the mid map (after DELF, Noh et al. 2017).

    Each place of the map gets a unit descriptor d_i and an attention a_i = softplus(x_i) / sum; the
    local view is sum_i a_i d_i at unit length. The pairs (a_i, d_i) themselves serve re-ranking.
    """

    dim: int
    dtype: layers.Dtype = jnp.float32

    def setup(self) -> None:
        self.describe = layers.conv(self.dim, 1, dtype=self.dtype, use_bias=True)
        self.attend = layers.conv(1, 1, dtype=self.dtype, use_bias=True)

    def local_features(
        self, mid: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b p"], Float[Array, "b p d"]]:
        """Attention (of sum 1) and unit descriptor of every place of the map."""
        batch = mid.shape[0]
        x = self.attend(mid).astype(jnp.float32).reshape(batch, -1)
        # In logarithms, where softplus(x) ~ e^x: an image without anything to attend to would
        # else have a descriptor of length 0.
        logarithm = jnp.where(x < -15, x, jnp.log(nn.softplus(jnp.maximum(x, -15))))
        attention = nn.softmax(logarithm)
        descriptors = layers.l2_normalise(self.describe(mid).reshape(batch, -1, self.dim))
        return attention, descriptors

    def strongest(self, mid: Float[Array, "b h w c"], count: int) -> LocalFeatures:
        """The places with the most attention: `count` of them, or all when the map has fewer."""
        attention, descriptors = self.local_features(mid)
        _, height, width, _ = mid.shape
        strength, which = lax.top_k(attention, min(count, height * width))
        centre = jnp.stack([(which % width + 0.5) / width, (which // width + 0.5) / height], -1)
        return LocalFeatures(
            strength, centre, jnp.take_along_axis(descriptors, which[..., None], axis=1)
        )

    def __call__(self, mid: Float[Array, "b h w c"]) -> Float[Array, "b {self.dim}"]:
        attention, descriptors = self.local_features(mid)
        return layers.l2_normalise(jnp.einsum("bp,bpd->bd", attention, descriptors))
