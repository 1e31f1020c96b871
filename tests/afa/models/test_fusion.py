"""Fusion of descriptors, and second views."""

import jax.numpy as jnp
import numpy as np
from arrays import near, uniform, unit

from afa.models import views
from afa.models.fusion import fuse

# ---- fusion ------------------------------------------------------------------------------------


def test_dot_product_of_fused_vectors_is_the_weighted_mean_of_similarities():
    blocks = {name: unit(i, 6, 3 + i) for i, name in enumerate(("global", "local", "flip"))}
    weights = {"global": 1.0, "flip": 0.5, "local": 0.25}
    fused = fuse(blocks, weights)
    near(jnp.linalg.norm(fused, axis=1), np.ones(6))
    similarity = {name: np.asarray(block @ block.T) for name, block in blocks.items()}
    expected = sum(w * similarity[name] for name, w in weights.items()) / 1.75
    near(fused @ fused.T, expected)
    # A block of weight 0, or one that nobody asks for, is of no account.
    none = fuse(blocks, {"global": 1.0, "local": 0.0})
    near(none @ none.T, similarity["global"])
    near(fuse(blocks, {"global": 1.0}), blocks["global"])


# ---- views -------------------------------------------------------------------------------------


def test_flip_is_an_involution_of_the_columns():
    x = uniform(0, 2, 4, 5, 3)
    np.testing.assert_array_equal(views.flip(x)[:, :, 0], x[:, :, -1])
    np.testing.assert_array_equal(views.flip(views.flip(x)), x)


def test_median_equals_numpys():
    x = np.array(uniform(1, 2, 7, 6, 3))
    x[0, 2:5] = x[0, 2, 0]  # ties
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    shifted = [wide[:, dy : dy + 7, dx : dx + 6] for dy in range(3) for dx in range(3)]
    np.testing.assert_array_equal(views.median(jnp.asarray(x)), np.median(shifted, axis=0))


def test_median_removes_salt_and_pepper():
    x = np.full((1, 8, 8, 3), 0.5, np.float32)
    x[0, 1::3, ::3] = np.random.default_rng(0).integers(0, 2, (3, 3, 3))
    near(views.median(jnp.asarray(x)), np.full_like(x, 0.5))


def test_standardise_undoes_contrast_and_brightness():
    x = uniform(2, 3, 8, 8, 3)
    y = np.asarray(views.standardise(x))
    near(y.mean((1, 2)), np.full((3, 3), 0.5), 1e-3)
    near(y.std((1, 2)), np.full((3, 3), 0.25), 1e-2)
    near(views.standardise(0.5 * x + 0.2), y, 1e-2)
    near(views.standardise(jnp.full((1, 4, 4, 3), 0.3)), np.full((1, 4, 4, 3), 0.5))
    assert y.min() >= 0
    assert y.max() <= 1
