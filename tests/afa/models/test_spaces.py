"""The spaces of generators: images, and mid maps of F."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from arrays import apply, near, uniform, variables_of

from afa.config import GeneratorConfig
from afa.models import generators
from afa.models.backbones.vit import ViT
from afa.models.embedder import Embedder
from afa.models.spaces import IMAGES, MID_MAPS
from afa.train import steps

SPACES = pytest.mark.parametrize("space", [IMAGES, MID_MAPS], ids=["images", "mid"])


@pytest.fixture(scope="module")
def made():
    """Context and state of a run whose generator restores mid maps."""
    chosen = tiny.config(**{"generator.name": "features"})
    context = tiny.context(chosen, {"generator": optax.adam(3e-3)})
    return context, tiny.state(context)


@SPACES
def test_a_point_is_described_as_its_image(made, space):
    context, state = made
    embedder, variables = context.networks.embedder, state.variables["embedder"]
    images = uniform(0, 2, tiny.SIDE, tiny.SIDE, 3)
    x = space.of(embedder, variables, images)
    assert x.shape[1:] == space.shape(embedder, tiny.SIDE)
    expected = apply(embedder, variables, images, train=False)
    for one, other in zip(
        space.describe(embedder, variables, x, train=False), expected, strict=True
    ):
        near(one, other)


def test_mid_maps_have_no_fixed_range():
    x = jnp.stack([jnp.full((2, 2, 1), 3.0), jnp.full((2, 2, 1), -0.5)])
    near(MID_MAPS.centred(x)[:, 0, 0, 0], [1, -1])
    near(MID_MAPS.normalised(2 * x, x)[:, 0, 0, 0], [2, -2])
    near(IMAGES.centred(x)[:, 0, 0, 0], [5, -2])
    near(IMAGES.normalised(2 * x, x), 2 * x)
    assert np.isfinite(MID_MAPS.centred(jnp.zeros((1, 2, 2, 1)))).all()


def test_a_discriminator_may_see_images_of_equal_brightness_and_contrast():
    """Mean 0 and deviation 1/2 over pixels and channels; a constant image is grey."""
    two = jnp.stack([jnp.full((2, 2, 3), 0.2), jnp.full((2, 2, 3), 0.6)], axis=0)
    level = functools.partial(IMAGES.centred, level=True)
    near(level(two), np.zeros((2, 2, 2, 3)))
    half = jnp.concatenate([two[:1], two[1:]], axis=2)  # mean 0.4, deviation 0.2
    expected = 0.5 * 0.2 / np.sqrt(0.2**2 + 1e-4)
    near(level(half)[0, 0, :, 0], expected * np.array([-1, -1, 1, 1]))
    x = uniform(0, 3, 16, 16, 3)
    seen = level(x)
    near(seen.mean((1, 2, 3)), np.zeros(3))
    near(seen.std((1, 2, 3)), np.full(3, 0.5), 2e-3)
    near(level(0.5 * x + 0.2), seen, 5e-3)
    near(MID_MAPS.centred(x, level=True), MID_MAPS.centred(x))


def test_mid_maps_of_a_transformer_have_a_shape_too():
    vit = ViT(8, 2, 3, patch=4, native=16, smooth=False)
    assert MID_MAPS.shape(Embedder(vit, 6, 4, 3, 0.2), 16) == (1, 17, 8)


@pytest.mark.parametrize("shape", [(4, 4, 6), (1, 17, 8)])
def test_an_untrained_feature_generator_is_the_identity(shape):
    config = GeneratorConfig("features", width=4, blocks=1, latent_dim=5)
    generator = generators.GENERATORS["features"][1](config, shape, jnp.float32)
    mid, z = 7 * uniform(0, 2, *shape), jnp.ones((2, 5))
    variables = variables_of(generator, mid, z)
    params = variables["params"]
    started = params | {"last": jax.tree.map(jnp.zeros_like, params["last"])}
    restored, sampled = apply(generator, {"params": started}, mid, z)
    np.testing.assert_array_equal(restored, mid)
    assert sampled.shape == mid.shape

    def change(mid, damage=0.0):
        given = mid, jnp.full(mid.shape[:-1], damage)
        return apply(generator, variables, *given, method="restore") - mid

    assert np.abs(change(mid)).max() > 0.01
    np.testing.assert_array_equal(change(mid, damage=1.0), change(mid))  # not used
    # The change grows with the features.
    near(change(10 * mid), 10 * change(mid), 1e-4)


def test_steps_restore_mid_maps_of_frozen_f(made):
    context, state = made
    step = jax.jit(functools.partial(steps.generator_step, context=context))
    batch = tiny.batch()
    after, first = step(state, batch)
    last = first
    for _ in range(40):
        after, last = step(after, batch)
    assert last["g_reconstruction"] < 0.8 * first["g_reconstruction"]
    assert last["psnr_out"][1] - last["psnr_in"][1] > first["psnr_out"][1] - first["psnr_in"][1]
    for leaf, other in zip(
        jax.tree.leaves(after.variables["embedder"]),
        jax.tree.leaves(state.variables["embedder"]),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, other)


def test_the_restored_view_is_the_upper_part_of_f_on_restored_mid_maps(made):
    context, state = made
    networks, variables = context.networks, state.variables
    images = uniform(1, 2, tiny.SIDE, tiny.SIDE, 3)
    blocks = jax.jit(networks.blocks)(variables, images)
    mid = apply(networks.embedder, variables["embedder"], images, train=False, method="lower")
    none = jnp.zeros(mid.shape[:-1])
    restored = apply(networks.generator, variables["generator"], mid, none, method="restore")
    expected = apply(
        networks.embedder, variables["embedder"], restored, train=False, method="upper"
    )
    near(blocks["restored"], expected.global_descriptor)
    # Mid maps are no view of a query, and D does not judge images.
    assert networks.candidates() == ("original",)
    assert not {"discriminator", "damage"} & set(networks.judges())
    _, candidates, scores = jax.eval_shape(networks.everything, variables, images)
    assert set(candidates) == {"original"} and set(scores) == set(networks.judges())
    verdict = apply(networks.discriminator, variables["discriminator"], mid, train=False)
    near(blocks["discriminator"], verdict.features)
