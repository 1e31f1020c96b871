"""Backbones, heads, and the networks composed."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from arrays import apply, near, normal, variables_of
from jax import lax

from afa import parallel
from afa.config import ExperimentConfig, with_changes
from afa.errors import UserError
from afa.models import backbones, embedder
from afa.models.backbones.contract import IMAGENET, Options
from afa.models.backbones.resnet import Block
from afa.models.heads import GlobalHead, LocalHead
from afa.models.networks import build_networks, dtype_of

# ---- ResNet ------------------------------------------------------------------------------------


def both_maps(module, x):
    mid = module.lower(x, False, "clean")
    return mid, module.upper(mid, False, "clean")


def shapes_of(name, stem, side):
    model = backbones.build(name, Options(stem))
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


def test_small_stem_has_larger_maps():
    maps, variables = shapes_of("resnet18", "small", 32)
    assert maps == [(2, 8, 8, 256), (2, 4, 4, 512)]
    assert variables["params"]["conv1"]["kernel"].shape == (3, 3, 3, 64)


def test_unknown_backbone_is_an_error(monkeypatch):
    # Tests of whole runs, which may share this process, bring a member of their own.
    monkeypatch.delitem(backbones.MEMBERS, "tiny", raising=False)
    with pytest.raises(UserError) as caught:
        backbones.build("resnet51", Options())
    assert str(caught.value) == (
        "backbone.name='resnet51' is unknown; did you mean 'resnet50'? "
        f"(allowed: {', '.join(sorted(backbones.MEMBERS))})"
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
        kernel = params[f"conv{number}" if number else "downsample.0"]["kernel"]
        norm = f"bn{number}" if number else "downsample.1"
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
    near(apply(block, variables, x, False, "clean"), expected, 1e-4)


def test_initial_block_is_the_identity():
    block, x = Block("basic", 8, 1), jnp.abs(normal(0, 2, 4, 4, 8))
    variables = block.init(jax.random.key(0), x, False, "clean")
    assert "downsample.0" not in variables["params"]
    np.testing.assert_array_equal(apply(block, variables, x, False, "clean"), x)


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
    near(apply(head, variables, jnp.asarray(x)), out / np.linalg.norm(out, axis=1, keepdims=True))


def test_gem_power_is_learned_and_ranges_from_mean_to_maximum():
    x = jnp.abs(normal(1, 2, 4, 4, 6)) + 0.1
    head = GlobalHead(5)
    variables = variables_of(head, x)
    variables["params"]["power"] = jnp.asarray(3.0)

    def at(power, x=x):
        params = variables["params"] | {"power": jnp.asarray(power)}
        return apply(head, {"params": params}, x)

    near(at(1.0), at(1.0, x.mean((1, 2), keepdims=True)), 1e-4)
    assert np.abs(at(30.0) - at(30.0, x.max((1, 2), keepdims=True))).max() < 0.1
    gradient = jax.grad(lambda p: apply(head, {"params": p}, x)[0, 0])(variables["params"])
    assert float(gradient["power"]) != 0


def test_heads_are_finite_for_a_map_of_zeros():
    for head in (GlobalHead(4), LocalHead(4)):
        zero = jnp.zeros((2, 3, 3, 5))
        variables = jax.tree.map(jnp.zeros_like, variables_of(head, zero))
        if "power" in variables["params"]:
            variables["params"]["power"] = jnp.asarray(3.0)

        def total(variables, x, head=head):
            return apply(head, variables, x).sum()

        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(variables, zero)
        for gradient in jax.tree.leaves(gradients):
            assert np.isfinite(gradient).all()


def test_local_head_is_the_attention_weighted_sum_of_local_features():
    mid = normal(2, 3, 4, 5, 6)
    head = LocalHead(7)
    variables = variables_of(head, mid)
    params = variables["params"]
    flat = np.asarray(mid).reshape(3, 20, 6)
    a = np.log1p(np.exp(flat @ params["attend"]["kernel"][0, 0] + params["attend"]["bias"]))
    d = flat @ params["describe"]["kernel"][0, 0] + params["describe"]["bias"]
    d /= np.linalg.norm(d, axis=-1, keepdims=True)
    attention, descriptors = apply(head, variables, mid, method="local_features")
    near(attention, a[..., 0] / a[..., 0].sum(1, keepdims=True))
    near(descriptors, d)
    pooled = (a * d).sum(1)
    near(apply(head, variables, mid), pooled / np.linalg.norm(pooled, axis=1, keepdims=True))


def test_local_descriptor_has_unit_length_for_tiny_attention():
    mid = normal(2, 3, 4, 5, 6)
    head = LocalHead(7)
    variables = variables_of(head, mid)
    attend = jax.tree.map(jnp.zeros_like, variables["params"]["attend"])
    attend["bias"] = jnp.full(1, -90.0)  # softplus(-90) ~ 1e-39
    variables["params"]["attend"] = attend
    near(jnp.linalg.norm(apply(head, variables, mid), axis=1), np.ones(3))


# ---- the networks composed ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed():
    context = tiny.context(tiny.config())
    variables = tiny.state(context).variables
    return context.networks, variables, jnp.asarray(tiny.batch()["image"][:4] / 255, jnp.float32)


def test_pooled_features_are_means_of_the_backbone_maps(composed):
    networks, variables, images = composed
    pooled = jax.jit(lambda v, x: networks.pooled(v, x, ("global", "flip")))
    blocks = pooled(variables, images)
    assert set(blocks) == {"global", "local", "flip"}
    own = {name: tree["backbone"] for name, tree in variables["embedder"].items()}

    @jax.jit
    def maps(x):
        x = (x - jnp.asarray(IMAGENET.mean)) / jnp.asarray(IMAGENET.std)
        return apply(networks.embedder.backbone, own, x, method=both_maps)

    for name, seen in (("global", images), ("flip", images[:, :, ::-1])):
        mid, last = maps(seen)
        for found, grid in ((blocks[name], last), (blocks["local"], mid)):
            mean = grid.mean((1, 2))
            near(found, mean / jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-4)
            if name == "flip":
                break  # the local view is that of the image itself
    heads = {
        name: value if name == "backbone" else jax.tree.map(lambda leaf: 7 + leaf, value)
        for name, value in variables["embedder"]["params"].items()
    }
    assert len(heads) > 1
    other = {"embedder": variables["embedder"] | {"params": heads}}
    assert set(pooled(other, images)) == {"global", "local", "flip"}
    jax.tree.map(np.testing.assert_array_equal, pooled(other, images), blocks)


def test_blocks_of_an_image(composed):
    networks, variables, images = composed
    blocks = jax.jit(networks.blocks)(variables, images)
    assert set(blocks) == set(networks.block_names())
    assert set(blocks) == {"global", "local", "posterior", "flip", "restored", "discriminator"}
    for block in blocks.values():
        near(jnp.linalg.norm(block, axis=1), np.ones(4), 1e-4)

    @jax.jit
    def described(images):
        return apply(networks.embedder, variables["embedder"], images, train=False)

    restored = jax.jit(networks.restore)(variables, images)
    assert restored.min() >= 0
    assert restored.max() <= 1
    near(blocks["global"], described(images).global_descriptor, 1e-4)
    near(blocks["local"], described(images).local, 1e-4)
    near(blocks["flip"], described(images[:, :, ::-1]).global_descriptor, 1e-4)
    near(blocks["restored"], described(restored).global_descriptor, 1e-4)
    proxies = apply(networks.embedder, variables["embedder"], method="proxies")["global"]
    shares = np.exp(blocks["global"] @ proxies.T / networks.embedder.temperature)
    near(blocks["posterior"], shares / np.linalg.norm(shares, axis=1, keepdims=True), 1e-4)


def test_only_wanted_blocks_are_computed(composed):
    networks, variables, images = composed
    plain = dataclasses.replace(networks, generator=None, discriminator=None)
    found = jax.eval_shape(plain.blocks, variables, images)
    assert set(found) == {"global", "local", "posterior", "flip"}
    found = jax.eval_shape(
        lambda *given: networks.blocks(*given, wanted=("flip",)), variables, images
    )
    assert set(found) == {"global", "local", "flip"}
    with pytest.raises(ValueError, match="no generator"):
        plain.restore(variables, images)


def test_restored_view_uses_the_branch_it_was_trained_with(composed):
    networks, variables, images = composed
    joint = dataclasses.replace(networks, restored_branch="adversarial")
    few = {"wanted": ("restored",)}
    clean, perturbed = (
        jax.jit(lambda v, x, each=each: each.blocks(v, x, **few))(variables, images)
        for each in (networks, joint)
    )
    near(clean["global"], perturbed["global"], 1e-4)
    assert np.abs(clean["restored"] - perturbed["restored"]).max() > 1e-3
    restored = networks.restore(variables, images)
    expected = apply(
        networks.embedder, variables["embedder"], restored, train=False, branch="adversarial"
    )
    near(perturbed["restored"], expected.global_descriptor, 1e-4)


def test_images_are_normalised_for_pretrained_weights(composed):
    networks, variables, _ = composed
    mean = jnp.tile(jnp.asarray(IMAGENET.mean), (1, 16, 16, 1))
    seen = []

    def note(next_function, args, kwargs, context):
        if context.method_name == "lower" and context.module is not networks.embedder:
            seen.append(args)
        return next_function(*args, **kwargs)

    with nn.intercept_methods(note):
        apply(networks.embedder, variables["embedder"], mean, train=False, method="lower")
    standardised = next(args[0] for args in seen if np.abs(args[0]).max() < 1e-6)
    assert standardised.shape == mean.shape


def test_proxies_are_unit_rows_in_every_view(composed):
    networks, variables, _ = composed
    proxies = apply(networks.embedder, variables["embedder"], method="proxies")
    assert {name: rows.shape for name, rows in proxies.items()} == {
        "global": (6, 12), "local": (6, 6), "fused": (6, 18)
    }  # fmt: skip
    for rows in proxies.values():
        near(jnp.linalg.norm(rows, axis=1), np.ones(6))
    unit_descriptors = embedder.Descriptors(proxies["global"], proxies["local"])
    near(embedder.named(unit_descriptors)["fused"], proxies["fused"])


def built(**changes):
    return build_networks(with_changes(ExperimentConfig(), **changes), 10)


def test_build_follows_the_configuration():
    networks = built(**{"discriminator.spectral_norm": True})
    assert networks.embedder.classes == 10
    assert networks.generator is not None
    assert networks.discriminator is not None
    assert networks.discriminator.spectral_norm
    assert networks.restored_branch == "clean"
    assert networks.view_names == ("flip", "median", "standardise")


@pytest.mark.parametrize("field", ["adversarial.enabled", "adversarial.generator"])
def test_no_generator_without_the_adversarial_part(field):
    networks = built(**{field: False})
    assert networks.generator is networks.discriminator is None
    assert "restored" not in networks.block_names()


def test_restored_view_uses_the_adversarial_branch_with_generated_training_views():
    joint = {"train.schedule": "joint", "adversarial.generated_views": 0.5}
    assert built(**joint).restored_branch == "adversarial"
    assert built(**{"adversarial.generated_views": 0.5}).restored_branch == "clean"


def test_unknown_view_is_an_error():
    with pytest.raises(UserError) as caught:
        built(**{"evaluation.views": ("flop",)})
    assert str(caught.value) == (
        "evaluation.views='flop' is unknown; did you mean 'flip'? "
        "(allowed: clahe, flip, median, standardise, zoom)"
    )


def test_auto_precision_depends_on_the_device(monkeypatch):
    for accelerated, expected in ((True, jnp.bfloat16), (False, jnp.float32)):
        monkeypatch.setattr(parallel, "accelerated", lambda it=accelerated: it)
        assert dtype_of("auto") == expected
        assert dtype_of("float32") == jnp.float32
        assert dtype_of("bfloat16") == jnp.bfloat16


def test_bfloat16_networks_give_float32_descriptors_near_the_exact_ones(composed):
    networks, variables, images = composed
    exact = apply(networks.embedder, variables["embedder"], images, train=False)
    module = networks.embedder
    coarse = module.backbone.clone(options=Options(dtype=jnp.bfloat16))
    half = module.clone(backbone=coarse, dtype=jnp.bfloat16)
    rough = apply(half, variables["embedder"], images, train=False)
    for mine, expected in zip(rough, exact, strict=True):
        assert mine.dtype == jnp.float32
        assert np.sum(mine * expected, axis=1).min() > 0.99
