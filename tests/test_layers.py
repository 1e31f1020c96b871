"""Convolution in both forms, batch normalisation with two sets of statistics, small layers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import apply, normal
from jax import lax

from afa import parallel
from afa.models import layers
from afa.models.backbones.resnet import ResNet

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def near(value, expected, tolerance=1e-5):
    """Equal up to `tolerance` of the largest entry."""
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, 0, tolerance * max(np.abs(expected).max(), 1e-3))


# ---- convolution -------------------------------------------------------------------------------


def half(kernel):
    return [(kernel // 2, kernel // 2)] * 2


CASES = [
    (kernel, stride, padding, size)
    for kernel in (1, 3, 7)
    for stride in (1, 2)
    for padding, size in (
        ("SAME", (5, 8)),
        ("VALID", (7, 9)),
        (half(kernel), (4, 4)),
        (half(kernel), (1, 2)),
        ([(0, 1), (2, 0)], (7, 6)),
    )
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), CASES)
def test_im2col_is_the_convolution(kernel, stride, padding, size):
    x, w = normal(0, 2, *size, 3), normal(1, kernel, kernel, 3, 4)

    def reference(x, w):
        return lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=DIMENSIONS
        )

    def ours(x, w):
        return layers.im2col_convolution(x, w, (stride, stride), padding)

    shape = jax.eval_shape(reference, x, w).shape
    cotangent = normal(2, *shape)

    def all_of(form):
        value, pull = jax.vjp(form, x, w)
        return value, *pull(cotangent)

    for mine, theirs in zip(*jax.jit(lambda: (all_of(ours), all_of(reference)))(), strict=True):
        near(mine, theirs)


def test_im2col_strides_of_two_axes_may_differ():
    x, w = normal(0, 2, 6, 9, 3), normal(1, 3, 3, 3, 4)
    expected = lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=DIMENSIONS)
    near(layers.im2col_convolution(x, w, (1, 2), "SAME"), expected)


def uses_xla(kernel, stride, side, **kwargs):
    x, w = jnp.zeros((1, side, side, 4)), jnp.zeros((kernel, kernel, 4, 4))
    if "feature_group_count" in kwargs:
        w = jnp.zeros((kernel, kernel, 1, 4))
    traced = jax.make_jaxpr(
        lambda x, w: layers.convolution(
            x, w, (stride, stride), half(kernel), dimension_numbers=DIMENSIONS, **kwargs
        )
    )(x, w)
    return "conv_general_dilated" in str(traced)


@pytest.mark.parametrize(
    ("kernel", "stride", "side", "xla"),
    [
        (1, 1, 1, False),
        (1, 1, 56, False),
        (1, 2, 56, False),
        (3, 1, 2, False),
        (3, 1, 3, True),
        (3, 1, 56, True),
        (3, 2, 4, False),
        (3, 2, 5, True),
        (3, 2, 56, True),
        (7, 2, 12, False),
        (7, 2, 64, True),
    ],
)
def test_convolution_takes_the_faster_form_on_the_cpu(monkeypatch, kernel, stride, side, xla):
    monkeypatch.setattr(parallel, "accelerated", lambda: False)
    assert uses_xla(kernel, stride, side) == xla
    monkeypatch.setattr(parallel, "accelerated", lambda: True)
    assert uses_xla(kernel, stride, side)


def test_grouped_and_dilated_convolutions_keep_xlas_form(monkeypatch):
    monkeypatch.setattr(parallel, "accelerated", lambda: False)
    assert uses_xla(3, 2, 4, feature_group_count=4)
    assert uses_xla(3, 2, 4, rhs_dilation=(2, 2))
    assert uses_xla(3, 2, 4, lhs_dilation=(2, 2))
    assert not uses_xla(3, 2, 4, rhs_dilation=(1, 1), lhs_dilation=(1, 1))


def test_a_whole_resnet18_agrees_in_both_forms(monkeypatch):
    model = ResNet("basic", (2, 2, 2, 2), "imagenet", 8)
    pictures = normal(0, 4, 64, 64, 3)

    def whole(variables):
        def forward(module, x):
            mid = module.lower(x, True, "clean")
            return mid, module.upper(mid, True, "clean")

        maps, _ = apply(model, variables, pictures, method=forward, mutable=["batch_stats"])
        return maps

    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0),
            pictures,
            method=lambda m, x: m.upper(m.lower(x, True, "clean"), True, "clean"),
        )
    )
    params = jax.tree.map(
        lambda leaf: np.asarray(
            draw.normal(size=leaf.shape) * 0.05 if len(leaf.shape) == 4 else np.ones(leaf.shape),
            np.float32,
        ),
        shapes["params"],
    )
    stats = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes["batch_stats"])

    def run(accelerated):
        monkeypatch.setattr(parallel, "accelerated", lambda: accelerated)

        def loss(params):
            mid, last = whole({"params": params, "batch_stats": stats})
            return jnp.mean(jnp.square(last)) + jnp.mean(mid), (mid, last)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (ours, maps), gradient = run(False)
    (theirs, their_maps), their_gradient = run(True)
    assert maps[1].shape == (4, 2, 2, 64)
    near(ours, theirs)
    for mine, other in zip(maps, their_maps, strict=True):
        near(mine, other, 1e-4)
    for mine, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(their_gradient), strict=True):
        near(mine, other, 1e-3)


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
    pushed, changed = apply(
        norm, variables, x, train=True, branch="adversarial", mutable=["batch_stats"]
    )
    after = changed["batch_stats"]
    for each in ("clean_mean", "clean_var"):
        np.testing.assert_array_equal(after[each], before[each])
    near(after["adversarial_mean"], 0.1 * x.mean(0))
    near(after["adversarial_var"], 0.9 + 0.1 * x.var(0))

    # The affine part is shared: in training mode the branch cannot be told from the output.
    clean, _ = apply(norm, variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(pushed, clean)
    moved = variables | changed
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    mean, var = after["adversarial_mean"], after["adversarial_var"]
    near(apply(norm, moved, x, train=False), scale * x / np.sqrt(1 + 1e-5) + bias)
    near(
        apply(norm, moved, x, train=False, branch="adversarial"),
        scale * (x - mean) / np.sqrt(var + 1e-5) + bias,
    )


def test_batch_norm_of_a_constant_is_its_bias_with_a_finite_gradient():
    norm, variables = fresh_norm()
    x = jnp.full((8, 4), 7.0)
    near(apply(norm, variables, x, train=True), jnp.tile(variables["params"]["bias"], (8, 1)), 1e-4)
    gradient = jax.grad(lambda x: apply(norm, variables, x, train=True).sum())(x)
    assert np.isfinite(gradient).all()


def test_initialising_leaves_the_statistics_alone():
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


def test_max_pool_never_prefers_its_padding():
    x = -1 - jnp.abs(normal(0, 1, 4, 4, 2))
    y = layers.max_pool(x)
    assert y.shape == (1, 2, 2, 2)
    np.testing.assert_array_equal(y[0, 0, 0], x[0, :2, :2].max((0, 1)))
    np.testing.assert_array_equal(y[0, 1, 1], x[0, 1:, 1:].max((0, 1)))


@pytest.mark.parametrize("size", [(4, 4), (5, 6), (1, 2), (7, 3)])
def test_max_pool_and_its_gradient_are_xlas(monkeypatch, size):
    # Rounding makes equal neighbours, of which the first must get the slope.
    x = jnp.round(2 * normal(0, 3, *size, 4))

    def both(accelerated):
        monkeypatch.setattr(parallel, "accelerated", lambda: accelerated)
        y, pull = jax.vjp(layers.max_pool, x)
        return y, pull(normal(1, *y.shape))[0]

    (ours, slope), (theirs, expected) = both(False), both(True)
    np.testing.assert_array_equal(ours, theirs)
    near(slope, expected, 1e-6)


@pytest.mark.parametrize("shape", [(6, 2, 5), (6, 5, 2)])
def test_product_and_its_gradient_are_those_of_matrices(shape):
    rows, inside, outside = shape
    x, w = normal(0, rows, inside), normal(1, inside, outside)
    cotangent = normal(2, rows, outside)
    (y, pull), (z, expected) = jax.vjp(layers.product, x, w), jax.vjp(jnp.matmul, x, w)
    near(y, z)
    for mine, theirs in zip(pull(cotangent), expected(cotangent), strict=True):
        near(mine, theirs)


def test_l2_normalise_gives_float32_unit_rows_and_survives_zero():
    x = normal(0, 5, 7)
    near(layers.l2_normalise(x), x / np.linalg.norm(x, axis=1, keepdims=True))
    assert layers.l2_normalise(x.astype(jnp.bfloat16)).dtype == jnp.float32
    zero = jnp.zeros((2, 3))
    assert (layers.l2_normalise(zero) == 0).all()
    assert np.isfinite(jax.grad(lambda x: layers.l2_normalise(x).sum())(zero)).all()
