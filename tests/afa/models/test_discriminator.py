"""The discriminator, its map of the damage, and the augmentation of what it sees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import apply, near, uniform, variables_of

from afa.losses.adversarial import pixel_loss
from afa.models.discriminator import Discriminator, diffaugment
from afa.models.views import level


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_discriminator_gives_a_logit_and_unit_features(spectral_norm):
    judge = Discriminator(4, 2, spectral_norm)
    images = uniform(0, 3, 16, 16, 3)
    variables = variables_of(judge, images, train=False)
    apply = jax.jit(judge.apply, static_argnames="train")
    verdict = apply(variables, images, train=False)
    assert verdict.logit.shape == (3,)
    assert verdict.features.shape == (3, 4 + 8)
    near(jnp.linalg.norm(verdict.features, axis=1), np.ones(3))
    alone = apply(variables, images[1:2], train=False)
    near(alone.logit, verdict.logit[1:2])
    assert ("batch_stats" in variables) == spectral_norm


def test_spectral_norm_bounds_every_kernel():
    judge = Discriminator(3, 1, True)
    images = uniform(0, 2, 8, 8, 3)
    variables = variables_of(judge, images, train=False)
    # Ten times the weights: without normalisation the verdicts would grow a hundredfold.
    params = jax.tree.map_with_path(
        lambda path, x: x * (10 if path[-1].key == "kernel" else 1), variables["params"]
    )
    step = jax.jit(lambda v: apply(judge, v, images, train=True, mutable=["batch_stats"]))

    def settled(params):
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        for _ in range(30):
            _, changed = step(state)
            state |= changed
        return state

    small, large = settled(variables["params"]), settled(params)
    kernels = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    ]  # fmt: skip
    largest = sorted(float(np.linalg.norm(k.reshape(-1, k.shape[-1]), 2)) for k in kernels)
    stored = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(large["batch_stats"])
        if "sigma" in path[-1].key
    ]  # fmt: skip
    near(sorted(float(leaf) for leaf in stored), largest, 1e-3)
    verdicts = [apply(judge, each, images, train=False).logit for each in (small, large)]
    near(verdicts[0], verdicts[1], 1e-3)


# ---- logits of pixels ----------------------------------------------------------------------------


def test_a_discriminator_that_localises_has_a_logit_for_every_pixel():
    images = uniform(0, 3, 16, 24, 3)
    for levels in (1, 3):
        judge = Discriminator(4, levels, localise=True)
        verdict = apply(judge, judge.init(jax.random.key(0), images, train=False), images,
                        train=False)  # fmt: skip
        assert verdict.pixels.shape == (3, 16, 24)
        assert verdict.pixels.dtype == jnp.float32
        assert (verdict.pixels == 0).all()  # before training


def test_pixels_are_an_extra_output():
    """Logit and features are those of a discriminator without them, for images that are level, and
    weights that ignore what the median filter removes."""
    images = uniform(0, 3, 16, 16, 3)
    judge, plain = Discriminator(4, 2, localise=True), Discriminator(4, 2)
    params = variables_of(judge, images, train=False)["params"]
    first = params["Conv_0"]["kernel"]
    kernels = first[:, :, :3], first.at[:, :, 3:].set(0)
    of_images, padded = ({"params": params | {"Conv_0": {**params["Conv_0"], "kernel": each}}}
                         for each in kernels)  # fmt: skip
    variables = {"params": params}
    assert first.shape[2] == 9
    verdict = apply(judge, padded, images, train=False)
    without = apply(plain, of_images, level(images), train=False)
    assert without.pixels is None
    near(verdict.logit, without.logit)
    near(verdict.features, without.features)
    verdict = apply(judge, variables, images, train=False)
    assert np.abs(verdict.logit - without.logit).max() > 0.01
    assert np.std(verdict.pixels) > 0.1
    alone = apply(judge, variables, images[1:2], train=False)
    near(alone.pixels, verdict.pixels[1:2])


def test_brightness_and_contrast_do_not_change_a_verdict():
    images = uniform(0, 3, 16, 16, 3)
    judge, plain = Discriminator(4, 2, localise=True), Discriminator(4, 2)
    variables = variables_of(judge, images, train=False)
    first, second, other = (
        apply(judge, variables, x, train=False)
        for x in (images, 0.6 * images + 0.3, jnp.square(images))
    )
    for name in ("logit", "features", "pixels"):
        near(getattr(first, name), getattr(second, name), 1e-2)
        assert np.abs(getattr(first, name) - getattr(other, name)).max() > 0.03, name
    variables = variables_of(plain, images, train=False)
    one, two = (apply(plain, variables, x, train=False) for x in (images, 0.6 * images + 0.3))
    assert np.abs(one.logit - two.logit).max() > 0.1


@pytest.mark.parametrize(
    ("localise", "widths"), [(False, [4, 8, 16, 32, 32]), (True, [4] + [8] * 4)]
)
def test_channels_of_the_feature_maps(localise, widths):
    judge, x = Discriminator(4, 5, localise=localise), jnp.zeros((1, 32, 32, 3))
    shapes: Any = jax.eval_shape(lambda: judge.init(jax.random.key(0), x, train=False))
    kernels = [shapes["params"][f"Conv_{i}"]["kernel"].shape for i in range(5)]
    assert [kernel[-1] for kernel in kernels] == widths


def pictures(seed, scattered, rows=64):
    """Random ramps of colour with noise; one corner of each, or every 16th pixel in the mean, is
    hidden by one of eight colours."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16] / 15
    slopes = draw.uniform(-0.3, 0.3, (rows, 2, 1, 1, 3))
    ramps = 0.5 + slopes[:, 0] * (y[..., None] - 0.5) + slopes[:, 1] * (x[..., None] - 0.5)
    images = ramps + draw.normal(0, 0.1, ramps.shape)
    damage = scattered & (draw.random((rows, 16, 16)) < 1 / 16)
    for row in range(rows if not scattered else 0):
        top, left = draw.choice([0, 10], 2)
        damage[row, top : top + 6, left : left + 6] = True
    colours = draw.choice([0.1, 0.9], (rows, 1, 1, 3))
    images = np.clip(np.where(damage[..., None], colours, images), 0, 1)
    return jnp.asarray(images, jnp.float32), jnp.asarray(damage)


@pytest.mark.parametrize(
    ("scattered", "steps", "found", "last"), [(False, 60, 0.9, 0.1), (True, 200, 0.3, 0.2)]
)
def test_damaged_pixels_are_learned(scattered, steps, found, last):
    """Of unseen images: the share of the damaged pixels that is found, and the last loss."""
    judge, optimiser = Discriminator(8, 2, localise=True), optax.adam(1e-2)
    images, damage = pictures(0, scattered)
    params: Any = judge.init(jax.random.key(0), images, train=False)["params"]

    def pixels(params, images):
        return apply(judge, {"params": params}, images, train=False).pixels

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(lambda p: pixel_loss(pixels(p, images), damage))(params)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimiser.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    images, damage = pictures(1, scattered)
    hidden = np.asarray(pixels(params, images) < 0)
    assert hidden[damage].mean() > found
    assert (~hidden[~damage]).mean() > 0.95
    near(losses[0], np.log(2))
    assert losses[-1] < last


# ---- differentiable augmentation ---------------------------------------------------------------


def test_augmentation_is_a_function_of_image_and_key():
    images, keys = uniform(0, 4, 16, 16, 3), jax.random.split(jax.random.key(0), 4)
    augment = jax.jit(diffaugment)
    out = augment(images, keys)
    assert out.shape == images.shape
    np.testing.assert_array_equal(out, augment(images, keys))
    np.testing.assert_array_equal(augment(images[::-1], keys[::-1]), out[::-1])
    same = augment(jnp.tile(images[:1], (4, 1, 1, 1)), keys)
    assert all(np.abs(same[0] - same[i]).max() > 0.05 for i in range(1, 4))


def test_augmentation_passes_a_gradient_and_cuts_a_quarter_of_the_side():
    images, keys = uniform(0, 64, 16, 16, 3), jax.random.split(jax.random.key(1), 64)
    slope = np.asarray(jax.jit(jax.grad(lambda x: diffaugment(x, keys).sum()))(images))
    assert np.isfinite(slope).all()
    assert (np.abs(slope).reshape(64, -1).max(1) > 0.5).all()
    out = np.asarray(diffaugment(images, keys))
    grey = (out == 0.5).all(-1)
    assert grey.sum((1, 2)).max() == 16
    assert grey.sum((1, 2)).min() >= 4  # at a corner


def test_augmentation_stays_in_its_ranges():
    """Brightness within 0.2 and contrast within 0.7 to 1.3 of the image; shifts within 1/8."""
    keys = jax.random.split(jax.random.key(2), 200)
    left = np.full((16, 16, 3), 0.25, np.float32)
    left[:, 8:] = 0.75
    out = np.asarray(diffaugment(jnp.tile(jnp.asarray(left), (200, 1, 1, 1)), keys))
    inner = np.sort(out[:, 2:-2, 2:-2], axis=2)
    low, high = inner[:, :, 0].min((1, 2)), inner[:, :, -1].max((1, 2))
    contrast = (high - low) / 0.5
    assert contrast.min() > 0.69
    assert contrast.max() < 1.31
    assert contrast.min() < 0.76
    assert contrast.max() > 1.24
    middle = (high + low) / 2
    assert np.abs(middle - 0.5).max() < 0.21
    steps = np.abs(np.diff(out[:, 2:-2, :, 0], axis=2)).sum(1)  # the cutout crosses few rows
    edges = steps[:, 4:11].argmax(1) + 4
    assert set(edges) == {5, 6, 7, 8, 9}
