"""A backbone without parameter values: its module, and the names and shapes of its parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from afa.models import backbones
from afa.models.backbones.contract import Options
from afa.models.embedder import IMAGENET_CLASSES
from afa.models.pretrained import match

Variables = dict[str, PyTree]


def logits_of(module: Any, x: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
    """Computes the logits of the published classifier from normalised images; for `apply`."""
    mid = module.lower(x, False, "clean")
    return module.logits(module.upper(mid, False, "clean"))


def skeleton(name: str) -> tuple[Any, Variables]:
    """Returns a backbone with its published classifier, and the shapes of its variables."""
    module = backbones.build(name, Options(classes=IMAGENET_CLASSES))
    side = backbones.member(name).input_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(
        lambda x: module.init(jax.random.key(0), x, method=logits_of), image
    )  # fmt: skip
    return module, {"batch_stats": {}} | shapes


@functools.cache
def published_names(name: str) -> frozenset[str]:
    """Returns the published names of all parameters and statistics of a backbone."""
    return frozenset(match.published(path) for _, path, _ in match.leaves(skeleton(name)[1]))
