"""Batch normalisation with two sets of statistics, small layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import apply, normal

from afa import parallel
from afa.models import layers

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def near(value, expected, tolerance=1e-5):
    """Equal up to `tolerance` of the largest entry."""
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, 0, tolerance * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_conv_halves_exactly(kernel):
    layer = layers.conv(2, kernel, 2, dtype=jnp.float32)
    x = jnp.zeros((1, 8, 12, 3))
    out = jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), x)[0])
    assert out.shape == (1, 4, 6, 2)


# ---- batch normalisation -----------------------------------------------------------------------


def fresh_norm():
    norm = layers.BatchNorm()
    variables: Any = norm.init(jax.random.key(0), jnp.ones((2, 3, 3, 4)), train=True)
    params = {"scale": normal(5, 4), "bias": normal(6, 4)}
    return norm, {"params": params, "batch_stats": variables["batch_stats"]}


def test_batch_norm_equals_flax():
    norm, ours = fresh_norm()
    theirs = {
        "params": ours["params"],
        "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
    }

    def flax_norm(train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)

    for step in range(3):
        x = 2 + 3 * normal(step, 8, 3, 3, 4)
        y, changed = apply(norm, ours, x, train=True, mutable=["batch_stats"])
        expected, kept = apply(flax_norm(True), theirs, x, mutable=["batch_stats"])
        near(y, expected)
        ours, theirs = ours | changed, theirs | kept
    for each in ("mean", "var"):
        near(ours["batch_stats"][f"clean_{each}"], theirs["batch_stats"][each])
    x = normal(9, 8, 3, 3, 4)
    near(apply(norm, ours, x, train=False), apply(flax_norm(False), theirs, x))


def test_gradient_of_batch_norm_passes_through_its_statistics():
    norm, ours = fresh_norm()
    theirs = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    x, weight = normal(1, 6, 4), normal(2, 6, 4)

    def mine(x):
        return jnp.sum(weight * apply(norm, ours, x, train=True))

    def reference(x):
        variables = {"params": ours["params"], "batch_stats": stats}
        return jnp.sum(weight * apply(theirs, variables, x, mutable=["batch_stats"])[0])

    near(jax.grad(mine)(x), jax.grad(reference)(x), 1e-4)


def test_the_two_sets_of_statistics_are_independent():
    norm, variables = fresh_norm()
    before = variables["batch_stats"]
    x = 4 + normal(1, 16, 4)
    perturbed, changed = apply(
        norm, variables, x, train=True, branch="adversarial", mutable=["batch_stats"]
    )
    after = changed["batch_stats"]
    for each in ("clean_mean", "clean_var"):
        np.testing.assert_array_equal(after[each], before[each])
    near(after["adversarial_mean"], 0.1 * x.mean(0))
    near(after["adversarial_var"], 0.9 + 0.1 * x.var(0))

    # The affine part is shared: in training mode the branch cannot be told from the output.
    clean, _ = apply(norm, variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(perturbed, clean)
    moved = variables | changed
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    mean, var = after["adversarial_mean"], after["adversarial_var"]
    near(apply(norm, moved, x, train=False), scale * x / np.sqrt(1 + 1e-5) + bias)
    near(
        apply(norm, moved, x, train=False, branch="adversarial"),
        scale * (x - mean) / np.sqrt(var + 1e-5) + bias,
    )


def test_batch_norm_of_a_constant_is_the_bias_with_a_finite_gradient():
    norm, variables = fresh_norm()
    x = jnp.full((8, 4), 7.0)
    near(apply(norm, variables, x, train=True), jnp.tile(variables["params"]["bias"], (8, 1)), 1e-4)
    gradient = jax.grad(lambda x: apply(norm, variables, x, train=True).sum())(x)
    assert np.isfinite(gradient).all()


def test_initialisation_does_not_update_the_statistics():
    variables: Any = layers.BatchNorm().init(jax.random.key(0), normal(0, 4, 3) + 5, train=True)
    stats = variables["batch_stats"]
    assert set(stats) == {"clean_mean", "clean_var", "adversarial_mean", "adversarial_var"}
    for name, leaf in stats.items():
        np.testing.assert_array_equal(leaf, np.full(3, float(name.endswith("var"))))


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
    norm = layers.BatchNorm(dtype=jnp.bfloat16)
    x = (3 + normal(0, 64, 4)).astype(jnp.bfloat16)
    variables: Any = norm.init(jax.random.key(0), x, train=True)
    y, changed = apply(norm, variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(changed))
    exact = np.asarray(x, np.float32)
    near(changed["batch_stats"]["clean_var"], 0.9 + 0.1 * exact.var(0), 1e-4)


# ---- small layers ------------------------------------------------------------------------------


def test_max_pool_ignores_padding():
    x = -1 - jnp.abs(normal(0, 1, 4, 4, 2))
    y = layers.max_pool(x)
    assert y.shape == (1, 2, 2, 2)
    np.testing.assert_array_equal(y[0, 0, 0], x[0, :2, :2].max((0, 1)))
    np.testing.assert_array_equal(y[0, 1, 1], x[0, 1:, 1:].max((0, 1)))


@pytest.mark.parametrize("size", [(4, 4), (5, 6), (1, 2), (7, 3)])
def test_max_pool_and_its_gradient_equal_xla(monkeypatch, size):
    # Rounding makes equal neighbours, of which the first must get the slope.
    x = jnp.round(2 * normal(0, 3, *size, 4))

    def both(accelerated):
        monkeypatch.setattr(parallel, "accelerated", lambda: accelerated)
        y, vjp = jax.vjp(layers.max_pool, x)
        return y, vjp(normal(1, *y.shape))[0]

    (ours, gradient), (theirs, expected) = both(False), both(True)
    np.testing.assert_array_equal(ours, theirs)
    near(gradient, expected, 1e-6)


def test_l2_normalise_gives_float32_unit_rows_and_is_finite_at_zero():
    x = normal(0, 5, 7)
    near(layers.l2_normalise(x), x / np.linalg.norm(x, axis=1, keepdims=True))
    assert layers.l2_normalise(x.astype(jnp.bfloat16)).dtype == jnp.float32
    zero = jnp.zeros((2, 3))
    assert (layers.l2_normalise(zero) == 0).all()
    assert np.isfinite(jax.grad(lambda x: layers.l2_normalise(x).sum())(zero)).all()
