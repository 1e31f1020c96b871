"""Every form of a convolution and of its gradients agrees with XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import apply, normal
from jax import lax

from afa import parallel
from afa.models import cpu_convolution
from afa.models.backbones.resnet import ResNet

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def near(value, expected, tolerance=1e-5):
    """Equal up to `tolerance` of the largest entry."""
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, 0, tolerance * max(np.abs(expected).max(), 1e-3))


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


# Images whose windows are in the cache at a time, of two; 0: not even one, so XLA's form.
BLOCKS = [2, 1, 0]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), CASES)
def test_every_form_equals_xla(kernel, stride, padding, size, block, monkeypatch):
    monkeypatch.setattr(parallel, "accelerated", lambda: False)
    monkeypatch.setattr(cpu_convolution, "_block", lambda *_: block)
    x, w = normal(0, 2, *size, 3), normal(1, kernel, kernel, 3, 4)

    def reference(x, w):
        return lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=DIMENSIONS
        )

    def ours(x, w):
        return cpu_convolution.convolution(x, w, (stride, stride), padding)

    shape = jax.eval_shape(reference, x, w).shape
    cotangent = normal(2, *shape)

    def all_of(form):
        value, pull = jax.vjp(form, x, w)
        return value, *pull(cotangent)

    for mine, theirs in zip(*jax.jit(lambda: (all_of(ours), all_of(reference)))(), strict=True):
        near(mine, theirs)


@pytest.mark.parametrize("block", BLOCKS)
def test_strides_of_two_axes_may_differ(block, monkeypatch):
    monkeypatch.setattr(cpu_convolution, "_block", lambda *_: block)
    x, w = normal(0, 2, 6, 9, 3), normal(1, 3, 3, 3, 4)

    def reference(x, w):
        return lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=DIMENSIONS)

    def ours(x, w):
        return cpu_convolution.convolution(x, w, (1, 2), "SAME")

    value, pull = jax.vjp(ours, x, w)
    expected, expected_pull = jax.vjp(reference, x, w)
    near(value, expected)
    for mine, theirs in zip(pull(expected), expected_pull(expected), strict=True):
        near(mine, theirs)


def test_second_derivatives_equal_xla(monkeypatch):
    """R1 differentiates the discriminator twice."""
    monkeypatch.setattr(parallel, "accelerated", lambda: False)
    x, w = normal(0, 2, 6, 6, 3), normal(1, 3, 3, 3, 4)

    def penalty(form):
        def of(w):
            gradient = jax.grad(lambda x: jnp.sum(jnp.tanh(form(x, w))))(x)
            return jnp.sum(jnp.square(gradient))

        return jax.jit(jax.grad(of))(w)

    def reference(x, w):
        return lax.conv_general_dilated(x, w, (2, 2), half(3), dimension_numbers=DIMENSIONS)

    near(
        penalty(lambda x, w: cpu_convolution.convolution(x, w, (2, 2), half(3))), penalty(reference)
    )


def uses_xla(kernel, stride, side, channels=4, **kwargs):
    x, w = jnp.zeros((1, side, side, channels)), jnp.zeros((kernel, kernel, channels, 4))
    traced = jax.make_jaxpr(
        lambda x, w: cpu_convolution.convolution(
            x, w, (stride, stride), half(kernel), dimension_numbers=DIMENSIONS, **kwargs
        )
    )(x, w)
    return "conv_general_dilated" in str(traced)


@pytest.mark.parametrize(
    ("kernel", "stride", "side", "channels", "xla"),
    [
        (1, 1, 1, 4, False),
        (1, 2, 56, 4, False),
        (3, 1, 2, 512, False),
        (3, 1, 64, 64, True),  # 9 MiB of windows
        (3, 2, 64, 64, False),
        (7, 2, 64, 3, False),
        (7, 2, 224, 3, True),
    ],
)
def test_convolution_takes_the_faster_form_on_the_cpu(
    monkeypatch, kernel, stride, side, channels, xla
):
    monkeypatch.setattr(parallel, "accelerated", lambda: False)
    assert uses_xla(kernel, stride, side, channels) == xla
    monkeypatch.setattr(parallel, "accelerated", lambda: True)
    assert uses_xla(kernel, stride, side, channels)


@pytest.mark.parametrize(
    ("batch", "cache", "blocks"), [(6, 4, 3), (7, 4, 1), (3, 4, 3), (3, 0.5, 0)]
)
def test_a_block_is_the_largest_part_of_the_batch_that_fits(monkeypatch, batch, cache, blocks):
    x, w = normal(0, batch, 8, 8, 3), normal(1, 3, 3, 3, 4)
    monkeypatch.setattr(cpu_convolution, "CACHE", int(cache * 8 * 8 * 27 * 4))
    assert cpu_convolution._block(x, w, (1, 1), ((1, 1), (1, 1))) == blocks


@pytest.mark.parametrize("side", [4, 18])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("groups", "channels", "outputs"), [(4, 8, 16), (16, 64, 128), (2, 128, 256), (12, 12, 12)]
)
def test_grouped_convolutions_agree(side, stride, groups, channels, outputs):
    x, w = normal(0, 2, side, side, channels), normal(1, 3, 3, channels // groups, outputs)

    def reference(x, w):
        return lax.conv_general_dilated(
            x, w, (stride, stride), half(3), dimension_numbers=DIMENSIONS,
            feature_group_count=groups,
        )  # fmt: skip

    def ours(x, w):
        return cpu_convolution.convolution(
            x, w, (stride, stride), half(3), feature_group_count=groups
        )

    near(ours(x, w), reference(x, w))
    gradients = [
        jax.grad(lambda x, w, f=f: jnp.sum(jnp.square(f(x, w))), argnums=(0, 1))(x, w)
        for f in (ours, reference)
    ]
    for mine, expected in zip(*gradients, strict=True):
        near(mine, expected)


def test_dilated_convolutions_use_xla(monkeypatch):
    monkeypatch.setattr(parallel, "accelerated", lambda: False)
    assert uses_xla(3, 2, 4, rhs_dilation=(2, 2))
    assert uses_xla(3, 2, 4, lhs_dilation=(2, 2))
    assert not uses_xla(3, 2, 4, rhs_dilation=(1, 1), lhs_dilation=(1, 1))


def test_resnet18_agrees_in_both_forms(monkeypatch):
    model = ResNet("basic", (2, 2, 2, 2), width=8)
    images = normal(0, 4, 64, 64, 3)

    def whole(variables):
        def forward(module, x):
            mid = module.lower(x, True, "clean")
            return mid, module.upper(mid, True, "clean")

        maps, _ = apply(model, variables, images, method=forward, mutable=["batch_stats"])
        return maps

    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0),
            images,
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


@pytest.mark.parametrize("shape", [(6, 2, 5), (6, 5, 2)])
def test_product_and_its_gradient_equal_matmul(shape):
    rows, inside, outside = shape
    x, w = normal(0, rows, inside), normal(1, inside, outside)
    cotangent = normal(2, rows, outside)
    (y, pull), (z, expected) = jax.vjp(cpu_convolution.product, x, w), jax.vjp(jnp.matmul, x, w)
    near(y, z)
    for mine, theirs in zip(pull(cotangent), expected(cotangent), strict=True):
        near(mine, theirs)
