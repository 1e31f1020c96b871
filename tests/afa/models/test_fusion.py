"""Fusion of descriptors, the gate of the restored view, and second views."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arrays import apply, near, normal, uniform, unit

from afa.models import views
from afa.models.fusion import RestorationGate, fuse, shares

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


def test_a_gate_opens_and_closes_its_block():
    blocks = {"global": unit(0, 3, 4), "restored": unit(1, 3, 4)}
    weights = {"global": 1.0, "restored": 3.0}
    gate = jnp.array([0.0, 0.5, 1.0])
    fused = np.asarray(fuse(blocks, weights, {"restored": gate}))
    for row, opened in enumerate((0.0, 1.5, 3.0)):
        parts = [blocks["global"][row], np.sqrt(opened) * blocks["restored"][row]]
        near(fused[row], np.concatenate(parts) / np.sqrt(1 + opened))

    def total(gate):
        return fuse(blocks, weights, {"restored": gate})[:, 0].sum()

    assert np.isfinite(jax.grad(total)(gate)).all()


def test_the_gate_of_a_query_weighs_its_restored_view_against_itself():
    """w_x sqrt(1 - g) s(x, y) + w_r sqrt(g) s(x^, y), for vectors of unit length: open, x is
    closed; closed, x^ is; and the gallery's own gate is never asked."""
    x, restored, y, other = (unit(i, 3, 4) for i in range(4))
    weights = {"global": 1.0, "restored": 2.0}
    gate = jnp.array([0.0, 0.3, 1.0])
    query = fuse({"global": x, "restored": restored}, weights, shares("learned", gate))
    gallery = [
        fuse({"global": y, "restored": view}, weights, shares("verdict", opened), "gallery")
        for view, opened in ((restored, gate), (other, 1 - gate))
    ]
    np.testing.assert_array_equal(gallery[0], gallery[1])
    near(jnp.linalg.norm(gallery[0], axis=1), np.ones(3))
    g = np.asarray(gate)
    expected = np.sqrt(1 - g) * np.sum(x * y, 1) + 2 * np.sqrt(g) * np.sum(restored * y, 1)
    length = np.sqrt((1 - g) + 2 * g) * np.sqrt(3)
    near(np.sum(query * gallery[0], 1), expected / length, 1e-5)


def test_a_fixed_gate_knows_no_roles():
    blocks = {"global": unit(0, 3, 4), "restored": unit(1, 3, 4)}
    weights, gates = {"global": 1.0, "restored": 2.0}, shares("fixed", jnp.ones(3))
    assert set(gates) == {"restored"}
    query, gallery = (fuse(blocks, weights, gates, role) for role in ("query", "gallery"))
    np.testing.assert_array_equal(query, gallery)
    np.testing.assert_array_equal(query, fuse(blocks, weights))


def gate_of(kind, variables: Any = None):
    x, r, before, after = unit(0, 5, 4), unit(1, 5, 4), normal(2, 5), normal(3, 5)
    gate = RestorationGate(kind)
    if variables is None:
        variables = gate.init(jax.random.key(0), x, r, before, after)
    return apply(gate, variables, x, r, before, after), variables, (x, r, before, after)


def test_fixed_gate_is_one_and_has_nothing_to_learn():
    opened, variables, _ = gate_of("fixed")
    near(opened, np.ones(5))
    assert "params" not in variables


def test_verdict_gate_asks_the_discriminator_which_image_is_more_real():
    opened, variables, (_, _, before, after) = gate_of("verdict")
    near(opened, 1 / (1 + np.exp(before - after)))
    assert "params" not in variables


def test_learned_gate_starts_half_open_and_is_a_logistic_regression():
    opened, variables, (x, r, _, _) = gate_of("learned")
    near(opened, np.full(5, 0.5))
    kernel = normal(4, 12, 1)
    moved, _, _ = gate_of(
        "learned", {"params": {"linear": {"kernel": kernel, "bias": jnp.ones(1)}}}
    )
    both = np.concatenate([x, r, x * r], axis=1)
    near(moved, 1 / (1 + np.exp(-(both @ kernel)[:, 0] - 1)))
    assert variables["params"]["linear"]["kernel"].shape == kernel.shape


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
