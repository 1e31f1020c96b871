"""Generator, discriminator, and the augmentation between them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from arrays import apply, near, normal, uniform, variables_of

from afa.config import GeneratorConfig
from afa.errors import UserError
from afa.models import generators
from afa.models.discriminator import Discriminator, diffaugment
from afa.models.generators.residual import Generator, Upsample, clip_unit, pixel_norm
from afa.models.spaces import IMAGES

# ---- generator ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    """Networks as a run begins with them: the one place that compiles their initialisers."""
    networks = tiny.networks(tiny.config())
    return networks, networks.init(jax.random.key(0), tiny.SIDE)


def images_and_noise():
    return uniform(0, 2, 16, 16, 3), normal(1, 2, 5)


@pytest.mark.parametrize(("width", "levels", "blocks"), [(1, 1, 1), (4, 1, 4), (8, 3, 2)])
def test_an_untrained_generator_is_the_identity(width, levels, blocks):
    """At every width and depth, for values at the ends of the range too; not so after a change of
    its last layer alone."""
    generator, (images, z) = Generator(width, levels, blocks, 5, 16), images_and_noise()
    images = images.at[0, :4].set(0).at[1, :4].set(1)
    variables: Any = generator.init(jax.random.key(0), images, z)
    np.testing.assert_array_equal(apply(generator, variables, images, method="restore"), images)
    params = variables["params"]
    last = jax.tree.map(lambda leaf: leaf + 0.1, params["last"])
    changed = apply(generator, {"params": params | {"last": last}}, images, method="restore")
    assert np.abs(changed - images).max() > 0.01


def test_both_modes_give_images(fresh):
    networks, variables = fresh
    images, z = images_and_noise()
    restored, sampled = jax.jit(networks.generator.apply)(variables["generator"], images, z)
    assert restored.shape == sampled.shape == (2, 16, 16, 3)
    assert restored.dtype == sampled.dtype == jnp.float32
    assert 0 < np.abs(sampled - 0.5).max() < 0.5


def test_what_is_made_of_an_image_or_of_noise_is_its_own():
    """No batch statistics."""
    generator, (images, z) = Generator(4, 2, 1, 5, 16), images_and_noise()
    variables = variables_of(generator, images, z)

    def mode(name, given):
        return jax.jit(generator.apply, static_argnames="method")(variables, given, method=name)

    for name, given in (("restore", images), ("sample", z)):
        assert np.abs(mode(name, given) - mode(name, given[::-1])).max() > 1e-4, name
        near(mode(name, given[:1]), mode(name, given)[:1])
    mean, log_variance = mode("encode", images)
    assert mean.shape == log_variance.shape == (2, 5)
    near(mode("encode", images[:1])[0], mean[:1])


def test_skips_carry_the_image_around_the_bottleneck():
    generator, (images, z) = Generator(4, 2, 1, 5, 16), images_and_noise()
    params = variables_of(generator, images, z)["params"]
    # Small changes, so that none of them is clipped.
    params["last"] = jax.tree.map(lambda leaf: 0.02 * leaf, params["last"])
    # The bottleneck is cut: what still tells two images apart has come by the skips.
    params |= {"down_0": jax.tree.map(jnp.zeros_like, params["down_0"])}
    restored = apply(generator, {"params": params}, images, method="restore")
    change = np.asarray(restored - images)
    assert np.abs(change[0] - change[1]).max() > 1e-3


@pytest.mark.parametrize(("side", "levels", "smallest"), [(8, 1, 4), (16, 4, 4), (224, 3, 7)])
def test_generator_fits_its_image_at_any_depth(side, levels, smallest):
    generator = Generator(4, levels, 1, 3, side)
    images, z = jnp.zeros((3, side, side, 3)), jnp.zeros((3, 3))
    out, variables = jax.eval_shape(
        lambda: generator.init_with_output(jax.random.key(0), images, z)
    )
    assert [each.shape for each in out] == [images.shape] * 2
    shape = variables["params"]["noise"]["kernel"].shape
    assert shape[0] == 3 and shape[1] % smallest**2 == 0
    assert variables["params"]["bottom_0"]["conv1"]["kernel"].shape[-1] == 4 * 2 ** (levels - 1)


def test_a_clipped_image_has_a_gradient_that_leads_inside():
    x = jnp.asarray([-0.5, -0.5, 0.0, 0.5, 1.0, 1.5, 1.5]).reshape(1, 1, 7, 1).repeat(3, 3)
    towards = jnp.asarray([-1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0]).reshape(1, 1, 7, 1).repeat(3, 3)
    clipped, pull = jax.vjp(clip_unit, x)
    np.testing.assert_array_equal(clipped, jnp.clip(x, 0, 1))
    # Descent moves against the gradient: -1 raises a value, 1 lowers it.
    np.testing.assert_array_equal(pull(towards)[0][0, 0, :, 0], [-1, 0, -1, 1, 1, 0, 1])


def test_generator_is_trained_on_what_it_serves():
    """Out of range, the gradient of the restored image reaches the last layer."""
    generator, (images, z) = Generator(4, 1, 1, 5, 16), images_and_noise()
    params = variables_of(generator, images, z)["params"]

    def loss(bias):
        last = {"kernel": jnp.zeros_like(params["last"]["kernel"]), "bias": jnp.full(12, bias)}
        out = apply(generator, {"params": params | {"last": last}}, images, method="restore")
        return jnp.square(out - 0.5).sum()

    for bias in (2.0, -2.0):
        value, slope = jax.value_and_grad(loss)(bias)
        near(value, 0.25 * images.size, 1e-5)  # all white or all black
        assert slope * bias > 0


def test_pixel_norm():
    x = 5 * normal(0, 2, 3, 3, 8)
    near(np.square(pixel_norm(x)).mean(-1), np.ones((2, 3, 3)), 1e-4)
    assert pixel_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.isfinite(jax.grad(lambda x: pixel_norm(x).sum())(jnp.zeros((1, 1, 1, 4)))).all()


def test_upsample_is_a_convolution_and_depth_to_space():
    x = normal(0, 1, 3, 4, 2)
    layer = Upsample(3, 3)
    variables = variables_of(layer, x)
    wide = apply(nn.Conv(12, (3, 3)), {"params": variables["params"]["conv"]}, x)
    y = np.asarray(apply(layer, variables, x))
    assert y.shape == (1, 6, 8, 3)
    for dy in range(2):
        for dx in range(2):
            place = slice(3 * (2 * dy + dx), 3 * (2 * dy + dx) + 3)
            near(y[:, dy::2, dx::2], wide[..., place])


# ---- discriminator -----------------------------------------------------------------------------


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


# ---- fresh networks -----------------------------------------------------------------------------


def test_fresh_variables_of_every_network(fresh):
    _, variables = fresh
    assert set(variables) == {"embedder", "generator", "discriminator"}
    for each in variables.values():
        assert set(each) == {"params", "batch_stats"}
    params = variables["embedder"]["params"]
    last = params["backbone"]["layer2.0"]
    assert (last["bn2"]["scale"] == 0).all()
    assert (last["bn1"]["scale"] == 1).all()
    assert float(params["global_head"]["power"]) == 3
    # He: variance 2 over the fan out.
    kernel = np.asarray(last["conv2"]["kernel"])
    near(kernel.std(), np.sqrt(2 / (9 * kernel.shape[-1])), 0.1)


def test_an_unknown_generator_is_refused():
    embedder = tiny.networks(tiny.config()).embedder
    with pytest.raises(UserError) as error:
        generators.build(GeneratorConfig(name="residuall"), embedder, 16, jnp.float32)
    assert str(error.value) == (
        "generator.name='residuall' is unknown; did you mean 'residual'? "
        "(allowed: features, residual)"
    )


def test_the_settings_reach_the_generator():
    config = GeneratorConfig(width=4, levels=1, blocks=3, latent_dim=7)
    embedder = tiny.networks(tiny.config()).embedder
    built = generators.build(config, embedder, 16, jnp.bfloat16)
    assert built == (Generator(4, 1, 3, 7, 16, jnp.bfloat16), IMAGES)
