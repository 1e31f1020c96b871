"""The residual generator, the blocks of its U-Net, and fresh networks."""

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
from afa.models.generators.inpainting import FillingGenerator, InpaintingGenerator
from afa.models.generators.residual import Generator
from afa.models.spaces import IMAGES
from afa.models.unet import Upsample, clip_unit, pixel_norm

# ---- generator ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    """Networks as a run begins with them: the one place that compiles their initialisers."""
    networks = tiny.networks(tiny.config())
    return networks, networks.init(jax.random.key(0), tiny.SIDE)


def images_and_noise():
    return uniform(0, 2, 16, 16, 3), normal(1, 2, 5)


def restore(generator, variables, images):
    """Without damage."""
    return apply(generator, variables, images, jnp.zeros(images.shape[:-1]), method="restore")


def with_last(params, last):
    """The parameters with another last layer of the U-Net."""
    return {"params": params | {"change": params["change"] | {"last": last}}}


@pytest.mark.parametrize(("width", "levels", "blocks"), [(1, 1, 1), (4, 1, 4), (8, 3, 2)])
def test_an_untrained_generator_is_the_identity(width, levels, blocks):
    """At every width and depth, for values at the ends of the range too; not so after a change of
    its last layer alone."""
    generator, (images, z) = Generator(width, levels, blocks, 5, 16), images_and_noise()
    images = images.at[0, :4].set(0).at[1, :4].set(1)
    variables: Any = generator.init(jax.random.key(0), images, z)
    np.testing.assert_array_equal(restore(generator, variables, images), images)
    params = variables["params"]
    last = jax.tree.map(lambda leaf: leaf + 0.1, params["change"]["last"])
    changed = restore(generator, with_last(params, last), images)
    assert np.abs(changed - images).max() > 0.01


def test_a_residual_generator_does_not_use_the_damage():
    generator, (images, z) = Generator(4, 1, 1, 5, 16), images_and_noise()
    variables = variables_of(generator, images, z)
    every = apply(generator, variables, images, jnp.ones(images.shape[:-1]), method="restore")
    np.testing.assert_array_equal(every, restore(generator, variables, images))


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
        damage = [jnp.zeros(given.shape[:-1])] if name == "restore" else []
        run = jax.jit(generator.apply, static_argnames="method")
        return run(variables, given, *damage, method=name)

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
    change = params["change"]
    last = jax.tree.map(lambda leaf: 0.02 * leaf, change["last"])
    # The bottleneck is cut: what still tells two images apart has come by the skips.
    params["change"] = change | {"down_0": jax.tree.map(jnp.zeros_like, change["down_0"])}
    restored = restore(generator, with_last(params, last), images)
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
    params = variables["params"]
    shape = params["codes"]["noise"]["kernel"].shape
    assert shape[0] == 3 and shape[1] % smallest**2 == 0
    bottom = params["change"]["bottom_0"]["conv1"]["kernel"]
    assert bottom.shape[-1] == 4 * 2 ** (levels - 1)


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
        kernel = jnp.zeros_like(params["change"]["last"]["kernel"])
        last = {"kernel": kernel, "bias": jnp.full(12, bias)}
        out = restore(generator, with_last(params, last), images)
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
        "(allowed: features, filling, inpainting, residual)"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("residual", Generator), ("inpainting", InpaintingGenerator), ("filling", FillingGenerator)],
)
def test_the_settings_reach_the_generator(name, kind):
    config = GeneratorConfig(name, width=4, levels=1, blocks=3, latent_dim=7)
    embedder = tiny.networks(tiny.config()).embedder
    built = generators.build(config, embedder, 16, jnp.bfloat16)
    assert built == (kind(4, 1, 3, 7, 16, jnp.bfloat16), IMAGES)
    assert type(built[0]) is kind
