"""The training steps on one device, compared with gradients of explicit objectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from arrays import apply
from arrays import near_tree as near
from step_cases import STEP, equal, key_of, made, row_keys

from afa import parallel
from afa.config import with_changes
from afa.losses.metric import metric_loss
from afa.models.embedder import named
from afa.train import steps

# ---- F -----------------------------------------------------------------------------------------


def explicit_objective(context, state, batch, perturb):
    """Gradient of 1/2 metric(F_0(x)) + 1/2 metric(F_1(h + delta)) in one expression."""
    chosen, embedder = context.config, context.networks.embedder
    images, labels = jnp.asarray(batch["image"]) / 255, jnp.asarray(batch["label"])
    variables = state.variables["embedder"]

    def metric(params, mid, branch):
        found, _ = apply(embedder,
            variables | {"params": params}, mid, train=True, branch=branch,
            method="upper", mutable=["batch_stats"],
        )  # fmt: skip
        proxies = apply(embedder, {"params": params}, method="proxies")
        states = state.loss_states({})
        key = key_of(chosen, "metric_loss", STEP)
        return metric_loss(chosen.loss, states, named(found), labels, proxies, key)[0]

    def lower(params):
        return apply(embedder,
            variables | {"params": params}, images, train=True, method="lower",
            mutable=["batch_stats"],
        )[0]  # fmt: skip

    params = variables["params"]
    mid = lower(params)
    gradient = jax.grad(metric, argnums=1)(params, mid, "clean")
    keys = row_keys(key_of(chosen, "perturbation", STEP), len(mid))
    strength = jnp.stack([jax.random.uniform(key) for key in keys])[:, None, None, None]

    def length(x):
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3), keepdims=True))

    delta = tiny.EPSILON * strength * length(mid) * gradient / length(gradient)

    def objective(params):
        h = lower(params)
        clean = metric(params, h, "clean")
        if not perturb:
            return clean, (clean, None)
        perturbed = metric(params, h + jax.lax.stop_gradient(delta), "adversarial")
        return clean / 2 + perturbed / 2, (clean, perturbed)

    return jax.grad(objective, has_aux=True)(params)


@pytest.mark.parametrize("perturb", [False, True])
def test_embedder_step_has_the_gradient_of_the_explicit_objective(perturb):
    context, state, step = made("perturb" if perturb else "plain")
    batch = tiny.batch()
    after, metrics = step(state, batch)
    expected, (clean, perturbed) = parallel.compiled_once(
        functools.partial(explicit_objective, context, perturb=perturb)
    )(state, batch)
    near(after.opt_state["embedder"], expected)
    np.testing.assert_allclose(metrics["metric_loss"], clean, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["embedder_gradient_norm"], optax.tree.norm(expected), rtol=1e-5
    )
    if perturb:
        np.testing.assert_allclose(metrics["adversarial_metric_loss"], perturbed, rtol=1e-5)
        assert perturbed > clean  # the perturbation increases the loss
    else:
        assert "adversarial_metric_loss" not in metrics


def statistics(state, branch):
    leaves = jax.tree_util.tree_leaves_with_path(state.variables["embedder"]["batch_stats"])
    return [leaf for path, leaf in leaves if path[-1].key.startswith(branch)]


def test_only_the_perturbed_pass_updates_the_adversarial_statistics():
    batch = tiny.batch()
    _, state, plain = made("plain")
    _, _, perturb = made("perturb")
    after, perturbed = plain(state, batch)[0], perturb(state, batch)[0]
    assert equal(statistics(after, "adversarial"), statistics(state, "adversarial"))
    assert not equal(statistics(after, "clean"), statistics(state, "clean"))
    near(statistics(perturbed, "clean"), statistics(after, "clean"))
    # Only the upper part has perturbed maps: the norms of the second block and its shortcut.
    changed = [
        not np.array_equal(*pair)
        for pair in zip(statistics(perturbed, "adversarial"), statistics(state, "adversarial"),
                        strict=True)
    ]  # fmt: skip
    assert sum(changed) == 2 * 3


def test_embedder_step_changes_no_other_network():
    _, state, step = made("perturb")
    after, _ = step(state, tiny.batch())
    for each in ("generator", "discriminator"):
        assert equal(after.variables[each], state.variables[each])
        assert equal(after.opt_state[each], state.opt_state[each])
    assert equal(after.average["generator"], state.average["generator"])
    assert not equal(after.variables["embedder"], state.variables["embedder"])
    assert not equal(after.average["embedder"], state.average["embedder"])
    assert int(after.step) == STEP + 1


def test_random_perturbation_increases_the_loss_less():
    _, state, perturb = made("perturb")
    _, _, random = made("perturb", adversarial__perturbation="random")
    batch = tiny.batch()
    _, gradient = perturb(state, batch)
    after, control = random(state, batch)
    np.testing.assert_allclose(control["metric_loss"], gradient["metric_loss"], rtol=1e-6)
    assert control["adversarial_metric_loss"] < gradient["adversarial_metric_loss"]
    # Its direction has a separate random stream, so the perturbation norms are the same.
    again, _ = random(state, batch)
    assert equal(after.opt_state, again.opt_state)


@pytest.mark.parametrize("perturb", [False, True])
def test_consistency_adds_the_distance_to_the_clean_image(perturb):
    """Its gradient is the difference of the gradients with and without it."""
    kind, weight = ("perturb", 0.5) if perturb else ("plain", 0.5)
    batch = tiny.batch()
    context, state, step = made(kind, train__consistency=weight)
    embedder, variables = context.networks.embedder, state.variables["embedder"]

    def fused(params, images):
        images = jnp.asarray(images) / 255
        found, _ = apply(embedder, variables | {"params": params}, images, train=True,
                         mutable=["batch_stats"])  # fmt: skip
        return named(found)["fused"]

    target = fused(variables["params"], batch["clean"])
    distance, gradient = parallel.compiled_once(
        jax.value_and_grad(lambda p: 1 - jnp.mean(jnp.sum(fused(p, batch["image"]) * target, -1)))
    )(variables["params"])
    after, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["consistency_loss"], distance, rtol=1e-5)
    assert distance > 1e-3
    if not perturb:  # with it, the direction of the perturbation changes as well
        _, _, without = made(kind)
        plain = without(state, batch)[0].opt_state["embedder"]
        added = jax.tree.map(lambda a, b: (a - b) / weight, after.opt_state["embedder"], plain)
        near(added, gradient, 1e-4)


def test_sharpness_aware_gradient():
    """It is the gradient at params + radius g / ||g||, and the update starts from params."""
    batch, radius = tiny.batch(), 0.05
    _, state, step = made("plain", optim__sam_radius=radius)
    _, _, plain = made("plain")
    gradient = plain(state, batch)[0].opt_state["embedder"]
    params, norm = state.variables["embedder"]["params"], optax.tree.norm(gradient)
    steepest = jax.tree.map(lambda p, g: p + radius * g / norm, params, gradient)
    moved = state.variables | {"embedder": state.variables["embedder"] | {"params": steepest}}
    expected = plain(state.replace(variables=moved), batch)[0].opt_state["embedder"]
    after, metrics = step(state, batch)
    near(after.opt_state["embedder"], expected, 1e-4)
    assert not np.allclose(optax.tree.norm(expected), norm, rtol=1e-3)
    _, at_params = plain(state, batch)
    np.testing.assert_allclose(metrics["metric_loss"], at_params["metric_loss"], rtol=1e-6)


def test_random_numbers_depend_on_seed_step_and_row():
    _, state, perturb = made("perturb")
    batch = tiny.batch()
    now, _ = perturb(state, batch)
    assert equal(now.opt_state, perturb(state, batch)[0].opt_state)
    later, _ = perturb(state.replace(step=state.step + 1), batch)
    assert not equal(now.opt_state["embedder"], later.opt_state["embedder"])
    keys = parallel.sample_keys(jax.random.key(0), 5)
    wider = parallel.sample_keys(jax.random.key(0), 9)
    assert np.array_equal(jax.random.key_data(keys), jax.random.key_data(wider)[:5])
    assert len({tuple(each) for each in jax.random.key_data(wider).tolist()}) == 9
    streams = [
        steps.stream(0, name, jnp.asarray(7)) for name in ("perturbation", "adversarial", "probe")
    ]
    streams += [
        steps.stream(1, "perturbation", jnp.asarray(7)),
        steps.stream(0, "perturbation", jnp.asarray(8)),
    ]
    assert len({tuple(jax.random.key_data(each).tolist()) for each in streams}) == 5
    expected = key_of(with_changes(tiny.config(), seed=0), "perturbation", 7)
    assert np.array_equal(jax.random.key_data(streams[0]), jax.random.key_data(expected))


# ---- joint steps and probe ---------------------------------------------------------------------

JOINT = {"train__schedule": "joint", "adversarial__generated_views": 0.5,
         "adversarial__lambda_features": 0.0, "optimisers": "real"}  # fmt: skip


def test_joint_step_updates_every_network_and_counts_once():
    _, state, step = made("joint", **JOINT)
    after, metrics = step(state, tiny.batch())
    for each in ("embedder", "generator", "discriminator"):
        moved, before = after.variables[each]["params"], state.variables[each]["params"]
        assert not any(map(np.array_equal, jax.tree.leaves(moved), jax.tree.leaves(before))), each
    for each in ("embedder", "generator"):
        assert not equal(after.average[each], state.average[each])
    assert int(after.step) == STEP + 1
    assert {"metric_loss", "adversarial_metric_loss", "generated_metric_loss",
            "discriminator_loss", "generator_loss"} <= set(metrics)  # fmt: skip
    assert all(np.isfinite(value).all() for value in metrics.values())


def test_labels_do_not_reach_the_generator_of_a_joint_step():
    """Not even through F: without the feature distance, G and D do not depend on F."""
    _, state, step = made("joint", **JOINT)
    batch = tiny.batch()
    relabelled = batch | {"label": (batch["label"][::-1] + 1).astype(np.int32) % tiny.CLASSES}
    one, other = step(state, batch)[0], step(state, relabelled)[0]
    for each in ("generator", "discriminator"):
        assert equal(one.variables[each], other.variables[each])
    assert not equal(one.variables["embedder"], other.variables["embedder"])


def test_generated_views_train_the_embedder_through_the_adversarial_branch():
    """The difference to the gradient without generated views is theirs; G and D, which estimates
    the damage, get no gradient."""
    views = {"train__schedule": "joint", "adversarial__generated_views": 0.5}
    context, state, step = made("plain", **views)
    _, _, without = made("plain")
    batch = tiny.batch()
    (after, metrics), (base, _) = step(state, batch), without(state, batch)
    found = jax.tree.map(jnp.subtract, after.opt_state["embedder"], base.opt_state["embedder"])
    restored = context.networks.restore(state.variables, jnp.asarray(batch["image"]) / 255)

    def explicit(params):
        descriptors, _ = apply(context.networks.embedder,
            state.variables["embedder"] | {"params": params}, restored, train=True,
            branch="adversarial", mutable=["batch_stats"],
        )  # fmt: skip
        proxies = apply(context.networks.embedder, {"params": params}, method="proxies")
        found, labels = named(descriptors), jnp.asarray(batch["label"])
        states = state.loss_states({})
        key = key_of(context.config, "metric_loss", STEP)
        return 0.5 * metric_loss(context.config.loss, states, found, labels, proxies, key)[0]

    loss, expected = parallel.compiled_once(jax.value_and_grad(explicit))(
        state.variables["embedder"]["params"]
    )
    near(found, expected, 1e-4)
    np.testing.assert_allclose(metrics["generated_metric_loss"], loss, rtol=1e-5)
    for each in ("generator", "discriminator"):
        assert equal(after.opt_state[each], state.opt_state[each])


def test_probe_does_not_change_the_state():
    _, state, step = made("probe")
    after, figures = step(state, tiny.batch())
    assert equal(after, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert set(figures) == {
        "recall_x", "recall_restored", "recall_fused", "spread_samples", "spread_images"
    }  # fmt: skip
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["spread_samples"] > 0


def test_a_few_steps_lower_the_loss():
    _, state, plain = made("plain")
    losses = []
    for i in range(25):
        state, metrics = plain(state, tiny.batch(seed=i % 3))
        losses.append(float(metrics["metric_loss"]))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert int(state.step) == STEP + 25


def test_images_become_floats_between_zero_and_one():
    bytes_ = jnp.asarray([[[[0, 51, 255]]]], jnp.uint8)
    np.testing.assert_allclose(steps.to_unit(bytes_)[0, 0, 0], [0, 0.2, 1], rtol=1e-6)
