"""What the families share: pooling, small stems, tokens as maps, second norms, sizes refused.

That each is the network it was published as, `test_parity` shows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from afa import parallel
from afa.errors import UserError
from afa.models import backbones, layers
from afa.models.backbones.contract import Options, Preprocessing
from afa.models.backbones.vit import ViT, cubic
from afa.models.embedder import Embedder
from afa.models.layers import apply
from afa.models.networks import build_backbone


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("side", [7, 8, 13])
@pytest.mark.parametrize(
    ("kernel", "strides", "padding", "ceil"),
    [(3, 2, 1, False), (3, 2, 0, True), (2, 2, 0, False), (3, 1, 1, False), (2, 2, 0, True)],
)
def test_pooling_on_cpu_equals_xla(monkeypatch, side, kernel, strides, padding, ceil):
    x = normal(2, side, side, 3)

    def both(pool):
        gradient = jax.grad(lambda x: jnp.sum(jnp.square(pool(x))))
        found = []
        for fast in (True, False):
            monkeypatch.setattr(parallel, "accelerated", lambda fast=fast: fast)
            found.append((pool(x), gradient(x)))
        for mine, expected in zip(*found, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)

    both(lambda x: layers.max_pool(x, kernel, strides, padding, ceil))
    if not ceil:
        both(lambda x: layers.avg_pool(x, kernel, strides, padding))


@pytest.mark.parametrize(("length", "side"), [(7, 7), (2, 7), (10, 3)])
def test_adaptive_pooling_covers_the_map(length, side):
    x = normal(1, length, length, 2)
    found = layers.adaptive_avg_pool(x, side)
    assert found.shape == (1, side, side, 2)
    for at in range(side):
        rows = slice(at * length // side, -(-(at + 1) * length // side))
        np.testing.assert_allclose(found[:, at, at], x[:, rows, rows].mean((1, 2)), rtol=1e-5)


def maps(module, x):
    mid = module.lower(x, False, "clean")
    return mid, module.upper(mid, False, "clean")


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "squeezenet1_0", "squeezenet1_1"])
def test_the_small_stem_keeps_maps_larger(name):
    sides = {}
    for stem in ("imagenet", "small"):
        module = backbones.build(name, Options(stem))
        run = lambda m=module: m.init_with_output(  # noqa: E731
            jax.random.key(0), jnp.zeros((1, 32, 32, 3)), method=maps
        )
        (mid, last), _ = jax.eval_shape(run)
        sides[stem] = mid.shape[1], last.shape[1]
    assert all(s > i for s, i in zip(sides["small"], sides["imagenet"], strict=True))


def test_missing_small_stem_is_an_error_listing_backbones_with_one():
    with pytest.raises(UserError) as caught:
        backbones.build("vgg16", Options("small"))
    assert str(caught.value).startswith(
        "backbone.stem='small': vgg16 has no such stem (allowed: densenet121, "
    )


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("inception_v3", 64, "inception_v3 needs at least 75 pixels"),
        ("bn_inception", 80, "bn_inception needs at least 16 pixels and a multiple of 32"),
    ],
)
def test_unsupported_image_sizes_are_an_error(name, size, expected):
    with pytest.raises(UserError) as caught:
        build_backbone(tiny.config(**{"backbone.name": name, "data.image_size": size}))
    assert str(caught.value) == f"data.image_size={size}: {expected}"


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens():
    """F of a transformer of three blocks with two registers, and its variables."""
    vit = ViT(24, 2, 3, 4, 16, True, 2, True)
    module = Embedder(vit, 12, 6, 5, 0.1)
    return module, module.init(jax.random.key(0), normal(2, 16, 16, 3), train=False)


def test_tokens_become_descriptors(tokens):
    module, variables = tokens
    found = apply(module, variables, normal(2, 24, 24, 3), train=False)  # not the native size
    assert [each.shape for each in found] == [(2, 12), (2, 6)]
    backbone = {"params": variables["params"]["backbone"]}
    mid, last = apply(module.backbone, backbone, normal(2, 16, 16, 3), method=maps)
    assert mid.shape == last.shape == (2, 1, 1 + 2 + 16, 24)
    grid = module.backbone.grid(mid)
    np.testing.assert_array_equal(grid.reshape(2, 16, 24), mid[:, 0, 3:])
    pooled = module.backbone.pool(last)
    np.testing.assert_allclose(pooled[:, :24], last[:, 0, 0])
    np.testing.assert_allclose(pooled[:, 24:], last[:, 0, 3:].mean(1), rtol=1e-5)


def test_adversarial_branch_has_its_own_normalisation(tokens):
    module, variables = tokens
    images = normal(2, 16, 16, 3)

    def both(variables):
        return [apply(module, variables, images, train=False, branch=b).global_descriptor
                for b in ("clean", "adversarial")]  # fmt: skip

    clean, adversarial = both(variables)
    np.testing.assert_array_equal(clean, adversarial)  # at first

    def perturb(path, leaf):
        own = path[-1].key.startswith("adversarial_")
        return leaf + jnp.linspace(-1, 1, leaf.size) if own else leaf

    after_clean, after_adversarial = both(jax.tree.map_with_path(perturb, variables))
    np.testing.assert_array_equal(after_clean, clean)
    assert np.abs(after_adversarial - clean).max() > 1e-3


@pytest.mark.parametrize("smooth", [False, True])
def test_positions_of_the_native_size_are_unchanged(smooth):
    np.testing.assert_allclose(cubic(9, 9, smooth), np.eye(9), atol=1e-6)
    for after in (5, 14):
        np.testing.assert_allclose(cubic(9, after, smooth).sum(1), 1, rtol=1e-5)


def test_layer_norm_equals_linen():
    x = normal(3, 8)
    mine, theirs = layers.LayerNorm(), nn.LayerNorm(epsilon=1e-6)
    found = mine.apply(mine.init(jax.random.key(0), x), x)
    expected = theirs.apply(theirs.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-5)


# ---- what the network sees -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def convolutional():
    """A tiny F, its variables and images in [0.3, 0.7]."""
    state = tiny.state(tiny.context(tiny.config()))
    images = jnp.asarray(np.random.default_rng(0).uniform(0.3, 0.7, (2, 16, 16, 3)), jnp.float32)
    return tiny.networks(tiny.config()).embedder, state.variables["embedder"], images


def embed(module, variables, images):
    return np.asarray(apply(module, variables, images, train=False).global_descriptor)


def test_channels_are_reversed_before_normalisation(convolutional):
    module, variables, images = convolutional
    figures = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    rgb, bgr = (
        module.clone(preprocessing=Preprocessing(*figures, channels)) for channels in ("rgb", "bgr")
    )
    turned = embed(bgr, variables, images)
    np.testing.assert_array_equal(turned, embed(rgb, variables, images[..., ::-1]))
    assert np.abs(turned - embed(rgb, variables, images)).max() > 1e-3


def test_standardised_images_are_invariant_to_brightness_and_contrast(convolutional):
    module, variables, images = convolutional
    hazy = 0.4 * images + 0.3
    level, plain = (module.clone(standardise=each) for each in (True, False))
    np.testing.assert_allclose(
        embed(level, variables, hazy), embed(level, variables, images), atol=5e-3
    )
    assert np.abs(embed(plain, variables, hazy) - embed(plain, variables, images)).max() > 0.05
