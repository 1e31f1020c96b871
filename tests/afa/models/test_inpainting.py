"""The inpainting generator: what it fills, and that it keeps the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from arrays import apply, near, normal, uniform, variables_of

from afa.models.generators.inpainting import (
    FillingGenerator,
    InpaintingGenerator,
    diffused,
    replaced,
)

# ---- filling by diffusion ------------------------------------------------------------------------


def mask(seed, share, *shape):
    """A random 0/1 mask with this share of damaged pixels."""
    return jnp.asarray(np.random.default_rng(seed).random((*shape, 1)) < share, jnp.float32)


def all_but_one(height, width):
    return jnp.ones((1, height, width, 1)).at[0, 3, 5].set(0)


def test_an_image_without_damage_is_itself():
    images = uniform(0, 2, 16, 16, 3)
    np.testing.assert_array_equal(diffused(images, jnp.zeros((2, 16, 16, 1))), images)


@pytest.mark.parametrize("side", [14, 16, 224])
def test_a_constant_image_stays_constant(side):
    """Under random masks, soft ones, and one that leaves a single pixel."""
    constant = jnp.broadcast_to(jnp.asarray([0.2, 0.5, 0.9]), (1, side, side, 3))
    shape = (1, side, side)
    for m in (*(mask(0, share, *shape) for share in (0.05, 0.5, 0.95)),
              uniform(1, *shape, 1), all_but_one(side, side)):  # fmt: skip
        near(diffused(constant, m), constant, 1e-4)


def test_a_faint_estimate_that_nothing_is_intact_darkens_no_image():
    """D is never certain: a thousandth of every pixel is left."""
    images = 0.4 + 0.2 * uniform(0, 1, 16, 16, 3)
    filled = diffused(images, jnp.full((1, 16, 16, 1), 0.999))
    near(filled, np.broadcast_to(images.mean((1, 2), keepdims=True), images.shape), 2e-3)


def test_a_fully_damaged_image_is_finite():
    images = uniform(0, 2, 16, 16, 3)
    filled, pull = jax.vjp(lambda x: diffused(x, jnp.ones((2, 16, 16, 1))), images)
    assert np.isfinite(filled).all() and np.isfinite(pull(filled)[0]).all()


@pytest.mark.parametrize(("row", "column"), [(0, 0), (7, 2), (15, 13), (4, 7), (9, 8)])
def test_a_damaged_pixel_lies_between_its_surroundings(row, column):
    image = np.full((1, 16, 16, 3), 0.2, np.float32)
    image[:, :, 8:] = 0.8
    spoiled, m = image.copy(), np.zeros((1, 16, 16, 1), np.float32)
    spoiled[0, row, column], m[0, row, column] = 1, 1
    filled = np.array(diffused(jnp.asarray(spoiled), jnp.asarray(m)))
    value = filled[0, row, column]
    assert (value >= 0.2 - 1e-6).all() and (value <= 0.8 + 1e-6).all()
    if column not in (7, 8):
        near(value, image[0, row, column], 0.02)
    filled[0, row, column] = image[0, row, column]
    near(filled, image, 1e-6)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.97])
@pytest.mark.parametrize("shape", [(16, 16), (12, 20)])
def test_filled_values_lie_between_the_intact_ones(share, shape):
    images, m = 0.3 + 0.4 * uniform(0, 3, *shape, 3), mask(1, share, 3, *shape)
    filled = diffused(jnp.where(m > 0, 1.0, images), m)
    for image, hidden, out in zip(images, m[..., 0] > 0, filled, strict=True):
        intact = np.asarray(image)[~np.asarray(hidden)]
        assert len(intact) > 1
        assert (out >= intact.min(0) - 1e-6).all() and (out <= intact.max(0) + 1e-6).all()


def explicit(image, weight):
    """(1 - m) x + m e by loops over one channel: `image` holds (1 - m) x, `weight` holds 1 - m."""
    height, width = image.shape
    if height <= 2 or height % 2 or width % 2:
        coarse = np.full(image.shape, image.sum() / weight.sum())
    else:
        means = [np.zeros((height // 2, width // 2)) for _ in range(2)]
        for mean, fine in zip(means, (image, weight), strict=True):
            for y in range(height // 2):
                for x in range(width // 2):
                    mean[y, x] = fine[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()
        below = explicit(*means)
        coarse = np.zeros(image.shape)
        for y in range(height):
            for x in range(width):
                # The pixel's block, and the neighbours on the side where the pixel lies.
                for dy, share_y in ((0, 0.75), (2 * (y % 2) - 1, 0.25)):
                    for dx, share_x in ((0, 0.75), (2 * (x % 2) - 1, 0.25)):
                        row = min(max(y // 2 + dy, 0), height // 2 - 1)
                        column = min(max(x // 2 + dx, 0), width // 2 - 1)
                        coarse[y, x] += share_y * share_x * below[row, column]
    return image + (1 - weight) * coarse


@pytest.mark.parametrize("shape", [(8, 8), (12, 12), (6, 4)])
def test_filling_equals_its_formula(shape):
    images, m = uniform(0, 2, *shape, 3), uniform(1, 2, *shape, 1)
    m = m.at[1].set(jnp.round(m[1]))
    found = diffused(images, m)
    left = np.asarray(1 - m, np.float64)
    for i in range(2):
        for channel in range(3):
            expected = explicit(left[i, ..., 0] * images[i, ..., channel], left[i, ..., 0])
            near(found[i, ..., channel], expected, 1e-4)


# ---- the generator -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    """A generator with random parameters, which changes images visibly."""
    generator = InpaintingGenerator(4, 2, 1, 5, 16)
    variables = variables_of(generator, jnp.zeros((2, 16, 16, 3)), jnp.zeros((2, 5)))
    params = variables["params"]
    last = jax.tree.map(lambda leaf: 0.1 * leaf, params["change"]["last"])
    return generator, {"params": params | {"change": params["change"] | {"last": last}}}


def restore(made, images, damage):
    generator, variables = made
    return apply(generator, variables, images, damage, method="restore")


def test_without_damage_it_is_the_identity(made):
    images = uniform(0, 2, 16, 16, 3).at[0, :4].set(0).at[1, :4].set(1)
    np.testing.assert_array_equal(restore(made, images, jnp.zeros((2, 16, 16))), images)


def test_doubt_is_no_damage(made):
    damage = jnp.asarray([[[0, 0.2, 0.35, 0.48, 0.675, 0.805, 1]]])
    near(replaced(damage)[0, 0, :, 0], [0, 0, 0, 0.2, 0.5, 0.7, 1])
    images = uniform(0, 2, 16, 16, 3)
    np.testing.assert_array_equal(restore(made, images, 0.35 * uniform(1, 2, 16, 16)), images)


def test_intact_pixels_keep_their_bits(made):
    images, damage = uniform(0, 2, 16, 16, 3), mask(1, 0.4, 2, 16, 16)[..., 0]
    restored = restore(made, images, damage)
    np.testing.assert_array_equal(restored[damage == 0], images[damage == 0])
    assert (np.abs(restored - images).max(-1)[damage > 0] > 1e-4).mean() > 0.95
    assert restored.min() >= 0 and restored.max() <= 1


def test_damaged_pixels_are_not_seen(made):
    """What hides them makes no difference."""
    images, damage = uniform(0, 2, 16, 16, 3), mask(1, 0.4, 2, 16, 16)[..., 0]
    others = jnp.where(damage[..., None] > 0, uniform(2, 2, 16, 16, 3), images)
    near(restore(made, images, damage), restore(made, others, damage), 1e-6)


@pytest.mark.parametrize("kind", [InpaintingGenerator, FillingGenerator])
def test_untrained_it_fills_by_diffusion(kind):
    """The control has nothing to train there."""
    generator = kind(4, 2, 1, 5, 16)
    images, damage = uniform(0, 2, 16, 16, 3), uniform(1, 2, 16, 16)
    variables: Any = generator.init(jax.random.key(0), images, normal(2, 2, 5))
    m = replaced(damage)
    expected = images + m * (diffused(images, m) - images)
    near(restore((generator, variables), images, damage), expected, 1e-6)
    assert ("change" in variables["params"]) == (kind is InpaintingGenerator)


@pytest.mark.parametrize(("contrast", "brightness"), [(1.6, -0.3), (0.5, 0.4), (1.0, 0.1)])
def test_brightness_and_contrast_pass_through(made, contrast, brightness):
    """restore(a x + b) = a restore(x) + b, as long as nothing is clipped."""
    images, damage = 0.35 + 0.3 * uniform(0, 2, 16, 16, 3), mask(1, 0.4, 2, 16, 16)[..., 0]
    restored = restore(made, images, damage)
    drawn = restored[damage > 0]
    assert drawn.min() > 0.2 and drawn.max() < 0.8
    filled = diffused(images, damage[..., None])
    assert np.abs(restored - filled).max() > 0.02  # the U-Net has a part in it
    changed = restore(made, contrast * images + brightness, damage)
    near(changed, contrast * restored + brightness, 2e-3)


def test_a_gradient_reaches_the_whole_unet(made):
    generator, variables = made
    images, damage = uniform(0, 2, 16, 16, 3), mask(1, 0.4, 2, 16, 16)[..., 0]

    def loss(params):
        restored = apply(generator, {"params": params}, images, damage, method="restore")
        return jnp.square(restored - 0.5).sum()

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree.leaves_with_path(gradient["change"]):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["codes"]))


# ---- with D --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inpainting", "residual"])
def test_search_restores_by_the_damage_that_the_discriminator_finds(kind):
    context = tiny.context(tiny.config(**{"generator.name": kind}))
    networks, variables = context.networks, tiny.state(context).variables
    images = jnp.asarray(tiny.batch()["image"] / 255, jnp.float32)
    verdict = apply(networks.discriminator, variables["discriminator"], images, train=False)
    if kind == "residual":
        assert verdict.pixels is None
        expected = np.zeros((16, 16, 16), np.float32)
    else:
        expected = 1 / (1 + np.exp(np.asarray(verdict.pixels)))
        assert expected.min() < 0.3 and expected.max() > 0.7
    near(networks.damage(variables, images), expected)
    by_hand = apply(networks.generator, variables["generator"], images, jnp.asarray(expected),
                    method="restore")  # fmt: skip
    near(jax.jit(networks.restore)(variables, images), by_hand)
    assert ("damage" in networks.judges()) == (kind == "inpainting")
