"""Backbones, heads, fusion, views, generator, discriminator, and the players composed."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax

from afa import parallel
from afa.config import ExperimentConfig, with_changes
from afa.errors import UserError
from afa.models import backbones, embedder, views
from afa.models.backbones.resnet import Block
from afa.models.discriminator import Discriminator, diffaugment
from afa.models.fusion import RestorationGate, fuse
from afa.models.generator import Generator, Upsample, pixel_norm
from afa.models.pooling import GlobalHead, LocalHead


def near(value, expected, tolerance=1e-5):
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def uniform(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


def unit(seed, *shape):
    x = normal(seed, *shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def filled(shapes, seed=0):
    """Variables of the given shapes, without compiling an initialiser."""
    draw = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = np.asarray(draw.normal(size=leaf.shape), np.float32)
        if path[-1].key.endswith("kernel"):
            return noise * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        return np.float32("var" in path[-1].key) + np.float32(0.2) * np.abs(noise)

    return jax.tree.map_with_path(fill, shapes)


def variables_of(module, *args, **kwargs):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    return jax.tree.map(jnp.asarray, filled(shapes))


# ---- ResNet ------------------------------------------------------------------------------------


def both_maps(module, x):
    mid = module.lower(x, False, "clean")
    return mid, module.upper(mid, False, "clean")


def shapes_of(name, stem, side):
    model = backbones.build(name, stem, jnp.float32)
    x = jnp.zeros((2, side, side, 3))
    maps, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), x, method=both_maps)
    )
    return [each.shape for each in maps], variables


# What torchvision counts, less its classifier.
@pytest.mark.parametrize(
    ("name", "count", "channels"),
    [
        ("resnet18", 11_176_512, 512),
        ("resnet34", 21_284_672, 512),
        ("resnet50", 23_508_032, 2048),
        ("resnet101", 42_500_160, 2048),
        ("resnet152", 58_143_808, 2048),
    ],
)
def test_resnet_has_the_published_size(name, count, channels):
    maps, variables = shapes_of(name, "imagenet", 64)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    assert maps == [(2, 4, 4, channels // 2), (2, 2, 2, channels)]


def test_small_stem_keeps_the_picture_large():
    maps, variables = shapes_of("resnet18", "small", 32)
    assert maps == [(2, 8, 8, 256), (2, 4, 4, 512)]
    assert variables["params"]["stem_conv"]["kernel"].shape == (3, 3, 3, 64)


def test_unknown_backbone_is_refused():
    with pytest.raises(UserError) as caught:
        backbones.build("resnet51", "small", jnp.float32)
    assert str(caught.value) == (
        "backbone.name='resnet51' is unknown; did you mean 'resnet50'? "
        "(allowed: resnet101, resnet152, resnet18, resnet34, resnet50)"
    )


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("strides", [1, 2])
def test_block_equals_its_equations(kind, strides):
    """Strides of a bottleneck stand on its 3x3 convolution; ReLU comes after the sum."""
    block = Block(kind, 4, strides)
    x = normal(0, 2, 6, 6, 8)
    variables = variables_of(block, x, False, "clean")
    params, stats = variables["params"], variables["batch_stats"]

    def step(x, number, stride, activate):
        kernel = params[f"conv{number}" if number else "shortcut_conv"]["kernel"]
        norm = f"norm{number}" if number else "shortcut_norm"
        pad = [((kernel.shape[0] - 1) // 2,) * 2] * 2
        y = lax.conv_general_dilated(
            x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = (y - stats[norm]["clean_mean"]) / np.sqrt(stats[norm]["clean_var"] + 1e-5)
        y = y * params[norm]["scale"] + params[norm]["bias"]
        return nn.relu(y) if activate else y

    if kind == "basic":
        y = step(step(x, 1, strides, True), 2, 1, False)
    else:
        y = step(step(step(x, 1, 1, True), 2, strides, True), 3, 1, False)
    expected = nn.relu(y + step(x, 0, strides, False))
    near(block.apply(variables, x, False, "clean"), expected, 1e-4)


def test_a_fresh_block_is_the_identity():
    block, x = Block("basic", 8, 1), jnp.abs(normal(0, 2, 4, 4, 8))
    variables = block.init(jax.random.key(0), x, False, "clean")
    assert "shortcut_conv" not in variables["params"]
    np.testing.assert_array_equal(block.apply(variables, x, False, "clean"), x)


# ---- heads -------------------------------------------------------------------------------------


def test_gem_head_equals_numpy():
    x = np.asarray(normal(1, 3, 4, 5, 6))
    head = GlobalHead(7)
    variables = variables_of(head, jnp.asarray(x))
    variables["params"]["power"] = jnp.asarray(2.5)
    kernel, bias = (variables["params"]["linear"][each] for each in ("kernel", "bias"))
    pooled = np.mean(np.maximum(x, 1e-4) ** 2.5, axis=(1, 2)) ** (1 / 2.5)
    spread = np.sqrt(pooled.var(1, keepdims=True) + 1e-6)
    out = (pooled - pooled.mean(1, keepdims=True)) / spread @ kernel + bias
    near(head.apply(variables, jnp.asarray(x)), out / np.linalg.norm(out, axis=1, keepdims=True))


def test_the_power_of_gem_is_learned_and_moves_from_mean_to_maximum():
    x = jnp.abs(normal(1, 2, 4, 4, 6)) + 0.1
    head = GlobalHead(5)
    variables = variables_of(head, x)
    variables["params"]["power"] = jnp.asarray(3.0)

    def at(power, x=x):
        params = variables["params"] | {"power": jnp.asarray(power)}
        return head.apply({"params": params}, x)

    near(at(1.0), at(1.0, x.mean((1, 2), keepdims=True)), 1e-4)
    assert np.abs(at(30.0) - at(30.0, x.max((1, 2), keepdims=True))).max() < 0.1
    slope = jax.grad(lambda p: head.apply({"params": p}, x)[0, 0])(variables["params"])
    assert float(slope["power"]) != 0


def test_heads_survive_a_map_of_zeros():
    for head in (GlobalHead(4), LocalHead(4)):
        zero = jnp.zeros((2, 3, 3, 5))
        variables = jax.tree.map(jnp.zeros_like, variables_of(head, zero))
        if "power" in variables["params"]:
            variables["params"]["power"] = jnp.asarray(3.0)

        def total(variables, x, head=head):
            return head.apply(variables, x).sum()

        slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(variables, zero)
        for slope in jax.tree.leaves(slopes):
            assert np.isfinite(slope).all()


def test_local_head_is_the_attention_weighted_sum_of_its_places():
    mid = normal(2, 3, 4, 5, 6)
    head = LocalHead(7)
    variables = variables_of(head, mid)
    params = variables["params"]
    flat = np.asarray(mid).reshape(3, 20, 6)
    a = np.log1p(np.exp(flat @ params["attend"]["kernel"][0, 0] + params["attend"]["bias"]))
    d = flat @ params["describe"]["kernel"][0, 0] + params["describe"]["bias"]
    d /= np.linalg.norm(d, axis=-1, keepdims=True)
    attention, descriptors = head.apply(variables, mid, method="places")
    near(attention, a[..., 0])
    near(descriptors, d)
    pooled = (a * d).sum(1)
    near(head.apply(variables, mid), pooled / np.linalg.norm(pooled, axis=1, keepdims=True))


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


def gate_of(kind, variables=None):
    x, r, before, after = unit(0, 5, 4), unit(1, 5, 4), normal(2, 5), normal(3, 5)
    gate = RestorationGate(kind)
    if variables is None:
        variables = gate.init(jax.random.key(0), x, r, before, after)
    return gate.apply(variables, x, r, before, after), variables, (x, r, before, after)


def test_fixed_gate_is_one_and_has_nothing_to_learn():
    opened, variables, _ = gate_of("fixed")
    near(opened, np.ones(5))
    assert "params" not in variables


def test_verdict_gate_asks_the_discriminator_which_picture_is_more_real():
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


# ---- generator ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    """Players as a run begins with them: the one place that compiles their initialisers."""
    players = tiny.players(tiny.config())
    return players, players.init(jax.random.key(0), tiny.SIDE)


def pictures_and_noise():
    return uniform(0, 2, 16, 16, 3), normal(1, 2, 5)


def test_an_untrained_generator_leaves_the_picture_almost_alone(fresh):
    players, variables = fresh
    images, z = pictures_and_noise()
    restored, imagined = jax.jit(players.generator.apply)(variables["generator"], images, z)
    assert restored.shape == imagined.shape == (2, 16, 16, 3)
    assert restored.dtype == imagined.dtype == jnp.float32
    assert 0 < np.abs(restored - images).max() < 0.5
    assert np.sqrt(np.mean(np.square(restored - images))) < 0.1
    assert np.abs(imagined - 0.5).max() < 0.5


def test_noise_reaches_both_modes_and_pictures_only_one(fresh):
    players, variables = fresh
    images, z = pictures_and_noise()

    def mode(name, *given):
        apply = jax.jit(players.generator.apply, static_argnames="method")
        return apply(variables["generator"], *given, method=name)

    by_mode = {
        "restore": lambda images, z: mode("restore", images, z),
        "imagine": lambda _, z: mode("imagine", z),
    }
    for name, made in by_mode.items():
        assert np.abs(made(images, z) - made(images, z + 1)).max() > 1e-4, name
        np.testing.assert_array_equal(made(images, z), made(images, z))
    # A picture's output is its own: no batch statistics.
    alone = by_mode["restore"](images[:1], z[:1])
    near(alone, by_mode["restore"](images, z)[:1])


@pytest.mark.parametrize(("side", "levels"), [(8, 1), (16, 4), (32, 3)])
def test_generator_fits_its_picture_at_any_depth(side, levels):
    generator = Generator(2, levels, 3, side)
    images, z = jnp.zeros((3, side, side, 3)), jnp.zeros((3, 3))
    out, variables = jax.eval_shape(
        lambda: generator.init_with_output(jax.random.key(0), images, z)
    )
    assert [each.shape for each in out] == [images.shape] * 2
    bottom = 2 * min(2**levels, 8)
    code = variables["params"]["code"]["kernel"].shape
    assert code == (3, (side // 2**levels) ** 2 * bottom)


def test_upsample_is_a_convolution_and_depth_to_space():
    x = normal(0, 1, 3, 4, 2)
    layer = Upsample(3)
    variables = variables_of(layer, x)
    wide = nn.Conv(12, (3, 3)).apply({"params": variables["params"]["conv"]}, x)
    y = np.asarray(layer.apply(variables, x))
    assert y.shape == (1, 6, 8, 3)
    for dy in range(2):
        for dx in range(2):
            place = slice(3 * (2 * dy + dx), 3 * (2 * dy + dx) + 3)
            near(y[:, dy::2, dx::2], wide[..., place])


def test_pixel_norm():
    x = 5 * normal(0, 2, 3, 3, 8)
    near(np.square(pixel_norm(x)).mean(-1), np.ones((2, 3, 3)), 1e-4)
    assert pixel_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.isfinite(jax.grad(lambda x: pixel_norm(x).sum())(jnp.zeros((1, 1, 1, 4)))).all()


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
    step = jax.jit(lambda v: judge.apply(v, images, train=True, mutable=["batch_stats"]))

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
    verdicts = [judge.apply(each, images, train=False).logit for each in (small, large)]
    near(verdicts[0], verdicts[1], 1e-3)


# ---- differentiable augmentation ---------------------------------------------------------------


def test_augmentation_is_a_function_of_picture_and_key():
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
    """Brightness within 0.2 and contrast within 0.7 to 1.3 of the picture; shifts within 1/8."""
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


# ---- the players composed ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed():
    recipe = tiny.recipe(tiny.config(**{"adversarial.gate": "verdict"}))
    variables = tiny.state(recipe).variables
    return recipe.players, variables, jnp.asarray(tiny.batch()["image"][:4] / 255, jnp.float32)


def test_blocks_of_a_picture(composed):
    players, variables, images = composed
    blocks, gates = jax.jit(players.blocks)(variables, images)
    assert set(blocks) == set(players.block_names())
    assert set(blocks) == {"global", "local", "posterior", "flip", "restored", "discriminator"}
    for block in blocks.values():
        near(jnp.linalg.norm(block, axis=1), np.ones(4), 1e-4)

    @jax.jit
    def described(pictures):
        return players.embedder.apply(variables["embedder"], pictures, train=False)

    @jax.jit
    def verdict(pictures):
        return players.discriminator.apply(variables["discriminator"], pictures, train=False).logit

    restored = jax.jit(players.restore)(variables, images)
    assert restored.min() >= 0
    assert restored.max() <= 1
    near(blocks["global"], described(images).whole, 1e-4)
    near(blocks["local"], described(images).local, 1e-4)
    near(blocks["flip"], described(images[:, :, ::-1]).whole, 1e-4)
    near(blocks["restored"], described(restored).whole, 1e-4)
    near(gates["restored"], 1 / (1 + np.exp(verdict(images) - verdict(restored))), 1e-4)
    proxies = players.embedder.apply(variables["embedder"], method="proxies")["global"]
    shares = np.exp(blocks["global"] @ proxies.T / players.embedder.temperature)
    near(blocks["posterior"], shares / np.linalg.norm(shares, axis=1, keepdims=True), 1e-4)


def test_only_wanted_blocks_are_computed(composed):
    players, variables, images = composed
    plain = dataclasses.replace(players, generator=None, discriminator=None, gate=None)
    found, gates = jax.eval_shape(plain.blocks, variables, images)
    assert set(found) == {"global", "local", "posterior", "flip"}
    assert gates == {}
    found, gates = jax.eval_shape(
        lambda *given: players.blocks(*given, wanted=("flip",)), variables, images
    )
    assert set(found) == {"global", "local", "flip"}
    assert gates == {}
    with pytest.raises(ValueError, match="no generator"):
        plain.restore(variables, images)


def test_the_restored_view_takes_the_branch_it_was_trained_in(composed):
    players, variables, images = composed
    joint = dataclasses.replace(players, restored_branch="adversarial")
    few = dict(wanted=("restored",))
    clean, pushed = (
        jax.jit(lambda v, x, each=each: each.blocks(v, x, **few)[0])(variables, images)
        for each in (players, joint)
    )
    near(clean["global"], pushed["global"], 1e-4)
    assert np.abs(clean["restored"] - pushed["restored"]).max() > 1e-3
    restored = players.restore(variables, images)
    expected = players.embedder.apply(
        variables["embedder"], restored, train=False, branch="adversarial"
    )
    near(pushed["restored"], expected.whole, 1e-4)


def test_pictures_are_standardised_as_pretrained_files_expect(composed):
    players, variables, _ = composed
    mean = jnp.tile(jnp.asarray(embedder.IMAGENET_MEAN), (1, 16, 16, 1))
    seen = []

    def note(next_function, args, kwargs, context):
        if context.method_name == "lower" and context.module is not players.embedder:
            seen.append(args)
        return next_function(*args, **kwargs)

    with nn.intercept_methods(note):
        players.embedder.apply(variables["embedder"], mean, train=False, method="lower")
    standardised = next(args[0] for args in seen if np.abs(args[0]).max() < 1e-6)
    assert standardised.shape == mean.shape


def test_proxies_are_unit_rows_in_every_view(composed):
    players, variables, _ = composed
    proxies = players.embedder.apply(variables["embedder"], method="proxies")
    assert {name: rows.shape for name, rows in proxies.items()} == {
        "global": (6, 12), "local": (6, 6), "fused": (6, 18)
    }  # fmt: skip
    for rows in proxies.values():
        near(jnp.linalg.norm(rows, axis=1), np.ones(6))
    unit_descriptors = embedder.Descriptors(proxies["global"], proxies["local"])
    near(embedder.named(unit_descriptors)["fused"], proxies["fused"])


def built(**changes):
    return embedder.build(with_changes(ExperimentConfig(), **changes), 10)


def test_build_follows_the_configuration():
    players = built(**{"discriminator.spectral_norm": True, "adversarial.gate": "learned"})
    assert players.embedder.classes == 10
    assert players.generator is not None
    assert players.discriminator is not None
    assert players.discriminator.spectral_norm
    assert players.gate is not None
    assert players.gate.kind == "learned"
    assert players.restored_branch == "clean"
    assert players.view_names == ("flip", "median", "standardise")


@pytest.mark.parametrize("field", ["adversarial.enabled", "adversarial.generator"])
def test_without_the_game_there_is_no_generator(field):
    players = built(**{field: False})
    assert players.generator is players.discriminator is players.gate is None
    assert "restored" not in players.block_names()


def test_generated_training_views_put_the_restored_view_on_its_own_statistics():
    joint = {"train.schedule": "joint", "adversarial.generated_views": 0.5}
    assert built(**joint).restored_branch == "adversarial"
    assert built(**{"adversarial.generated_views": 0.5}).restored_branch == "clean"


def test_unknown_view_is_refused():
    with pytest.raises(UserError) as caught:
        built(**{"evaluation.views": ("flop",)})
    assert str(caught.value) == (
        "evaluation.views='flop' is unknown; did you mean 'flip'? "
        "(allowed: flip, median, standardise)"
    )


def test_precision_follows_the_machine_unless_told(monkeypatch):
    for accelerated, expected in ((True, jnp.bfloat16), (False, jnp.float32)):
        monkeypatch.setattr(parallel, "accelerated", lambda it=accelerated: it)
        assert embedder.dtype_of("auto") == expected
        assert embedder.dtype_of("float32") == jnp.float32
        assert embedder.dtype_of("bfloat16") == jnp.bfloat16


def test_bfloat16_players_give_float32_descriptors_near_the_exact_ones(composed):
    players, variables, images = composed
    exact = players.embedder.apply(variables["embedder"], images, train=False)
    module = players.embedder
    half = module.clone(backbone=module.backbone.clone(dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    rough = half.apply(variables["embedder"], images, train=False)
    for mine, expected in zip(rough, exact, strict=True):
        assert mine.dtype == jnp.float32
        assert np.sum(mine * expected, axis=1).min() > 0.99


def test_fresh_variables_of_every_player(fresh):
    _, variables = fresh
    assert set(variables) == {"embedder", "generator", "discriminator", "gate"}
    for each in variables.values():
        assert set(each) == {"params", "batch_stats"}
    params = variables["embedder"]["params"]
    last = params["backbone"]["stage2_block1"]
    assert (last["norm2"]["scale"] == 0).all()
    assert (last["norm1"]["scale"] == 1).all()
    assert float(params["global_head"]["power"]) == 3
    # He: variance 2 over the fan out.
    kernel = np.asarray(last["conv2"]["kernel"])
    near(kernel.std(), np.sqrt(2 / (9 * kernel.shape[-1])), 0.1)
