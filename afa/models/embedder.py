"""The embedder F: backbone and heads, image -> unit descriptors."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers, views
from afa.models.backbones.contract import IMAGENET, Preprocessing
from afa.models.freezing import Frozen
from afa.models.fusion import fuse
from afa.models.heads import GlobalHead, LocalFeatures, LocalHead

IMAGENET_CLASSES = 1000

Images = Float[Array, "b h w 3"]
Proxies = dict[str, Float[Array, "classes _"]]


class Descriptors(NamedTuple):
    """Unit descriptors of a batch: global (b, d) and local (b, l)."""

    global_descriptor: Float[Array, "b d"]
    local: Float[Array, "b l"]


class Embedder(nn.Module):
    """F with its heads: image in [0, 1] -> mid map -> unit descriptors.

    The rows of the two class heads (global and local), normalised to unit length, are the proxies
    of the training classes. Proxy losses train them, and they give the class posterior.
    """

    backbone: Any
    embedding_dim: int
    local_dim: int
    classes: int
    temperature: float
    gem_power: float = 3.0
    dtype: layers.Dtype = jnp.float32
    preprocessing: Preprocessing = IMAGENET
    standardise: bool = False
    frozen: Frozen = Frozen()

    def setup(self) -> None:
        self.global_head = GlobalHead(self.embedding_dim, self.gem_power)
        self.local_head = LocalHead(self.local_dim, self.dtype)

        def proxies(name: str, dim: int) -> Float[Array, "classes d"]:
            # Length about 1: only the direction matters, and with update steps of fixed size a
            # shorter proxy changes its direction faster.
            return self.param(name, nn.initializers.normal(dim**-0.5), (self.classes, dim))

        self.class_head = proxies("class_head", self.embedding_dim)
        self.local_class_head = proxies("local_class_head", self.local_dim)

    def lower(
        self, images: Images, *, train: bool, branch: layers.Branch = "clean"
    ) -> Float[Array, "b y x c"]:
        """Computes the mid map of an image."""
        expected = self.preprocessing
        images = views.level(images) if self.standardise else images
        images = images if expected.channels == "rgb" else images[..., ::-1]
        images = (images - jnp.asarray(expected.mean)) / jnp.asarray(expected.std)
        with self.frozen.statistics(self.backbone):
            return self.backbone.lower(images, train, branch)

    def upper(
        self, mid: Float[Array, "b y x c"], *, train: bool, branch: layers.Branch = "clean"
    ) -> Descriptors:
        """Computes the descriptors from the mid map."""
        with self.frozen.statistics(self.backbone):
            last = self.backbone.upper(mid, train, branch)
        if self.is_initializing() and self.backbone.options.classes:
            self.backbone.logits(last)  # creates its parameters, which training does not use
        return Descriptors(
            self.global_head(self._global_input(last)), self.local_head(self._local_input(mid))
        )

    def _global_input(self, last: Float[Array, "b v u d"]) -> Float[Array, "b *places e"]:
        return self.backbone.pool(last) if hasattr(self.backbone, "pool") else last

    def _local_input(self, mid: Float[Array, "b y x c"]) -> Float[Array, "b h w c"]:
        return self.backbone.grid(mid) if hasattr(self.backbone, "grid") else mid

    def local_features(self, images: Images, count: int) -> LocalFeatures:
        """Computes the `count` strongest local features of an image, for geometric verification."""
        return self.local_head.strongest(self._local_input(self.lower(images, train=False)), count)

    def __call__(
        self, images: Images, *, train: bool, branch: layers.Branch = "clean"
    ) -> Descriptors:
        mid = self.lower(images, train=train, branch=branch)
        return self.upper(mid, train=train, branch=branch)

    def logits(self, images: Images) -> Float[Array, "b n"]:
        """Computes the logits of the published classifier."""
        mid = self.lower(images, train=False)
        return self.backbone.logits(self.backbone.upper(mid, False, "clean"))

    def pooled(self, images: Images) -> Descriptors:
        """Computes unit descriptors without the heads: means of the last map and of the mid map."""
        mid = self.lower(images, train=False)
        last = self._global_input(self.backbone.upper(mid, False, "clean"))
        means = (
            x.astype(jnp.float32).mean(tuple(range(1, x.ndim - 1)))
            for x in (last, self._local_input(mid))
        )
        return Descriptors(*map(layers.l2_normalise, means))

    def proxies(self) -> Proxies:
        """Returns the unit proxies of the training classes: global, local and fused."""
        blocks = {
            "global": layers.l2_normalise(self.class_head),
            "local": layers.l2_normalise(self.local_class_head),
        }
        return blocks | {"fused": fuse(blocks, FUSED)}

    def posterior(self, global_descriptor: Float[Array, "b d"]) -> Float[Array, "b classes"]:
        """Computes the class posterior: softmax of the cosines to the global proxies."""
        return nn.softmax(global_descriptor @ self.proxies()["global"].T / self.temperature)


# Weights of the fused descriptor in the metric loss. The weights for search are chosen later, on
# validation classes, for more blocks.
FUSED = {"global": 1.0, "local": 0.5}


def dims(embedder: Embedder) -> dict[str, int]:
    """Returns the dimension of each descriptor that the metric loss is applied to."""
    parts = {"global": embedder.embedding_dim, "local": embedder.local_dim}
    return parts | {"fused": sum(parts.values())}


def named(descriptors: Descriptors) -> dict[str, Float[Array, "b _"]]:
    """Returns the descriptors that the metric loss is applied to, keyed as their proxies."""
    blocks = {"global": descriptors.global_descriptor, "local": descriptors.local}
    return blocks | {"fused": fuse(blocks, FUSED)}
