"""Arrays for tests of single modules, drawn by NumPy, so that nothing has to be compiled."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def near(value: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)


def near_tree(value: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Asserts that leaves agree up to `tolerance` times the largest entry of the tree."""
    assert jax.tree.structure(value) == jax.tree.structure(expected)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for actual, other in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, other, rtol=0, atol=tolerance * largest)


def normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def uniform(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


def unit(seed: int, *shape: int) -> Array:
    """Rows of unit length."""
    x = normal(seed, *shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def variables_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Returns random variables of a module, without the zeros and ones of usual initialisation."""
    draw = np.random.default_rng(0)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> Array:
        noise = np.asarray(draw.normal(size=leaf.shape), np.float32)
        if path[-1].key.endswith("kernel"):
            return jnp.asarray(noise * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1]))))
        return jnp.asarray(np.float32("var" in path[-1].key) + np.float32(0.2) * np.abs(noise))

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    return jax.tree.map_with_path(fill, shapes)


def apply(module: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.apply` with return type Any."""
    return module.apply(*args, **kwargs)
