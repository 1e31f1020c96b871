"""The space in which a generator works: G restores, and D judges, images or mid maps of F."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from afa.models import layers, views
from afa.models.embedder import Embedder

Map = Float[Array, "b y x c"]
Shape = tuple[int, int, int]  # height, width, channels


@dataclasses.dataclass(frozen=True)
class Space:
    """Images in [0, 1], or the mid maps of frozen F.

    Attributes:
      name: "images" or "mid maps".
    """

    name: Literal["images", "mid maps"]

    @property
    def images(self) -> bool:
        return self.name == "images"

    def of(self, embedder: Embedder, variables: PyTree, images: Float[Array, "b h w 3"]) -> Map:
        """Images -> their points in this space; no gradient reaches F.

        Args:
          variables: variables of F.
        """
        if self.images:
            return images
        mid = layers.apply(embedder, variables, images, train=False, method="lower")
        return jax.lax.stop_gradient(mid).astype(jnp.float32)

    def shape(self, embedder: Embedder, image_size: int) -> Shape:
        """Returns the shape of a point, without computing one."""
        side = (image_size, image_size, 3)
        if self.images:
            return side

        def lower(images: Array) -> Any:
            found = embedder.init_with_output(
                jax.random.key(0), images, train=False, method="lower"
            )
            return found[0]

        return jax.eval_shape(lower, jnp.zeros((1, *side))).shape[1:]

    def describe(self, embedder: Embedder, variables: PyTree, x: Map, **kwargs: Any) -> Any:
        """Applies F to points of this space: the whole of it, or its upper part. Returns
        `Descriptors`, or with `mutable` a pair of them and the changed variables."""
        method = "__call__" if self.images else "upper"
        return layers.apply(embedder, variables, x, method=method, **kwargs)

    def normalised(self, x: Map, reference: Map) -> Map:
        """x in units of the peak of `reference`: 1 for images, the RMS of each mid map."""
        if self.images:
            return x
        return x / rms(reference)

    def centred(self, x: Map, level: bool = False) -> Map:
        """The input of D: images in [-1, 1], with `level` of equal brightness and contrast; mid
        maps with unit RMS."""
        if not self.images:
            return x / rms(x)
        return 2 * (views.level(x) if level else x) - 1


def rms(x: Map) -> Float[Array, "b 1 1 1"]:
    """Root mean square of each map; not 0 for an empty one."""
    wide = jnp.square(x.astype(jnp.float32))
    return jnp.sqrt(wide.mean((1, 2, 3), keepdims=True) + 1e-12)


IMAGES, MID_MAPS = Space("images"), Space("mid maps")
