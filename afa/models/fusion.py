"""Fusion of the descriptors of an image into one unit vector, which any index can search.

The vector concatenates unit blocks, block i scaled by sqrt(w_i), where w_i is the weight of the
block, chosen on validation classes. The dot product of two fused vectors is then the weighted mean
of the cosine similarities of the blocks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.models import layers

Blocks = Mapping[str, Float[Array, "b _"]]
Weights = Mapping[str, float]
Role = Literal["query", "gallery"]  # of an image in a search


@dataclasses.dataclass(frozen=True)
class Route:
    """How the view of a query that F describes is chosen (`afa.models.routing`).

    Attributes:
      judge: name of the judge that scores the views; unused for a single view.
      offsets: (view, offset); the view with the largest score + offset is described.
    """

    judge: str
    offsets: tuple[tuple[str, float], ...]

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(view for view, _ in self.offsets)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How an image becomes a vector.

    Attributes:
      weights: (block, weight) of the fused vector, weights above 0.
      route: of queries; None: a query is described like a gallery image.
    """

    weights: tuple[tuple[str, float], ...]
    route: Route | None = None

    @classmethod
    def of(cls, weights: Weights, route: Route | None = None) -> "Fusion":
        """Returns the fusion with these weights."""
        return cls(tuple(weights.items()), route)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Fusion":
        """Inverse of `to_json`."""
        route = stored["route"]
        if route is not None:
            route = Route(route["judge"], tuple(route["offsets"].items()))
        return cls.of(stored["weights"], route)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        route = self.route
        offsets = None if route is None else {"judge": route.judge, "offsets": dict(route.offsets)}
        return {"weights": dict(self.weights), "route": offsets}

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return tuple(name for name, _ in self.weights)

    def text(self) -> str:
        """Returns it in words, for tables."""
        words = ", ".join(f"{name} {weight:g}" for name, weight in self.weights)
        if self.route is None:
            return words
        if len(self.route.views) == 1:
            return f"{words}; query: {self.route.views[0]}"
        chosen = ", ".join(f"{view} {offset:+.2g}" for view, offset in self.route.offsets)
        return f"{words}; query by {self.route.judge}: {chosen}"


def fuse(blocks: Blocks, weights: Mapping[str, float | Float[Array, ""]]) -> Float[Array, "b d"]:
    """Fuses descriptor blocks into one unit vector per image.

    Args:
      blocks: block name -> unit descriptors.
      weights: block name -> weight; blocks without a weight are not used.
    """
    # The epsilon keeps the gradient of the square root finite at a weight of 0.
    parts = [jnp.sqrt(weight + 1e-12) * blocks[name] for name, weight in weights.items()]
    return layers.l2_normalise(jnp.concatenate(parts, axis=-1))
