"""Losses with a memory, parameters or random numbers, in training steps and checkpoints."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from arrays import apply
from own_losses import RandomWeights, TwoCentres

from afa import config as configuration
from afa import parallel
from afa.losses import LOSSES
from afa.losses.cross_batch_memory import CrossBatchMemory
from afa.models.embedder import dims, named
from afa.train import health, steps
from afa.train.checkpoint import Checkpoints, Position
from afa.train.state import checkpoint_id, create
from experiments import run as command

ROWS = 16
WEIGHTS = {"global": 1.0, "local": 0.5, "fused": 0.5}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for loss in (TwoCentres, RandomWeights):
        monkeypatch.setitem(LOSSES, loss.name, loss)


@functools.cache
def made(name, perturb=False):
    own = {"loss.size": 40} if name == "cross_batch_memory" else {}
    changes = {"loss.name": name, "optim.learning_rate": 3e-3, "data.batch_size": ROWS}
    context = tiny.context(tiny.config(**changes, **own))
    step = functools.partial(steps.embedder_step, context=context, perturb=perturb)
    return context, tiny.state(context), parallel.compiled_once(step)


def descriptors_of(context, state, batch):
    """Returns the descriptors of a batch in training mode, by block, and the unit proxies."""
    found, _ = apply(
        context.networks.embedder, state.variables["embedder"], jnp.asarray(batch["image"]) / 255,
        train=True, mutable=["batch_stats"],
    )  # fmt: skip
    proxies = apply(context.networks.embedder, state.variables["embedder"], method="proxies")
    return jax.tree.map(np.asarray, named(found)), proxies


def contrastive(x, y, others, labels, margin, skip_self):
    s = x @ others.T
    pairs = [(i, j) for i in range(len(x)) for j in range(len(others))
             if labels[j] >= 0 and not (skip_self and i == j)]  # fmt: skip
    near = [1 - s[i, j] for i, j in pairs if y[i] == labels[j]]
    far = [s[i, j] - margin for i, j in pairs if y[i] != labels[j] and s[i, j] > margin]
    return (np.mean(near) if near else 0) + (np.mean(far) if far else 0)


def softmax(x, y, proxies, temperature):
    logits = np.asarray(x @ proxies.T / temperature, np.float64)
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y])


def test_loss_with_a_memory_in_the_training_step():
    """A memory of 40 rows and batches of 16, compared with NumPy at every step."""
    context, state, step = made("cross_batch_memory")
    seen = []
    for number in range(4):
        batch = tiny.batch(ROWS, seed=number)
        y = batch["label"]
        blocks, proxies = descriptors_of(context, state, batch)
        expected = sum(
            weight * (
                contrastive(blocks[name], y, blocks[name], y, 0.5, skip_self=True)
                + contrastive(blocks[name], y, np.asarray(state.loss_memory[name]["x"]),
                              np.asarray(state.loss_memory[name]["y"]), 0.5, skip_self=False)
            ) + softmax(blocks[name], y, proxies[name], 0.05)
            for name, weight in WEIGHTS.items()
        ) / sum(WEIGHTS.values())  # fmt: skip
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["metric_loss"], expected, rtol=1e-4)
        seen = [(blocks, y), *seen]
        for name in WEIGHTS:
            kept = state.loss_memory[name]
            rows = np.concatenate([each[name] for each, _ in seen])[:40]
            labels = np.concatenate([each for _, each in seen])[:40]
            np.testing.assert_allclose(kept["x"][: len(rows)], rows, atol=1e-5)
            np.testing.assert_array_equal(kept["y"][: len(rows)], labels)
            assert (np.asarray(kept["y"])[len(rows) :] == -1).all()
    assert len(np.unique(state.loss_memory["global"]["y"])) > 1


def test_random_numbers_of_a_loss_in_the_training_step():
    """They depend on the seed, the step and the descriptor block."""
    context, state, step = made("random_weights", perturb=True)
    batch = tiny.batch(ROWS)
    y = batch["label"]
    for number in range(2):
        key = jax.random.fold_in(jax.random.key(3), zlib.crc32(b"metric_loss"))
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        blocks, proxies = descriptors_of(context, state, batch)
        expected = 0.0
        for (name, weight), own in zip(WEIGHTS.items(), keys, strict=True):
            losses = -jax.nn.log_softmax(blocks[name] @ proxies[name].T)[jnp.arange(ROWS), y]
            expected += weight * jnp.mean(losses * jax.random.uniform(own, (ROWS,)))
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["metric_loss"], expected / 2, rtol=1e-5)


def test_memory_has_no_perturbed_features():
    _, state, plain = made("cross_batch_memory")
    _, _, perturbed = made("cross_batch_memory", perturb=True)
    for number in range(2):
        batch = tiny.batch(ROWS, seed=number)
        one, other = plain(state, batch)[0], perturbed(state, batch)[0]
        for actual, theirs in zip(
            jax.tree.leaves(one.loss_memory), jax.tree.leaves(other.loss_memory), strict=True
        ):
            np.testing.assert_allclose(actual, theirs, atol=1e-5)
        state = one


def test_loss_parameters_are_trained_and_not_used_in_search():
    context, state, step = made("two_centres")
    assert set(state.variables["loss"]["params"]) == set(WEIGHTS)
    batch = tiny.batch(ROWS)
    blocks, _ = descriptors_of(context, state, batch)

    def explicit(params):
        total = 0.0
        for name, weight in WEIGHTS.items():
            centres = params[name]["centres"]
            centres /= jnp.sqrt(jnp.sum(centres**2, -1, keepdims=True))
            logits = 8 * jnp.maximum(*(blocks[name] @ each.T for each in centres))
            chosen = jax.nn.log_softmax(logits)[jnp.arange(ROWS), batch["label"]]
            total -= weight * jnp.mean(chosen)
        return total / sum(WEIGHTS.values())

    gradient = jax.grad(explicit)(state.variables["loss"]["params"])
    norm = np.sqrt(sum(np.sum(np.square(each)) for each in jax.tree.leaves(gradient)))
    first, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss_gradient_norm"], norm, rtol=1e-4)
    own = [each.variables["loss"]["params"] for each in (state, first)]
    assert explicit(own[1]) < explicit(own[0])
    # The first update of Adam has the opposite sign of the gradient.
    for name in WEIGHTS:
        before, now = (each.variables["loss"]["params"][name]["centres"] for each in (state, first))
        grad = np.asarray(gradient[name]["centres"])
        clear = np.abs(grad) > 1e-6
        assert clear.any()
        np.testing.assert_array_equal(np.sign(now - before)[clear], -np.sign(grad)[clear])
    assert "loss" not in first.search_variables()
    moved = first.variables | {"loss": state.variables["loss"]}
    assert checkpoint_id(first.replace(variables=moved)) == checkpoint_id(first)
    assert "loss" not in first.average


@pytest.mark.parametrize("name", ["cross_batch_memory", "two_centres"])
def test_loss_state_is_checkpointed(name, tmp_path):
    context, state, step = made(name)
    fresh = jax.eval_shape(
        lambda: create(
            context.networks, context.optimisers, 0, tiny.SIDE, context.config.loss, ROWS
        )
    )
    assert jax.tree.structure(fresh) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, state)
    state, _ = step(state, tiny.batch(ROWS))
    with Checkpoints(tmp_path, keep_best=0) as checkpoints:
        checkpoints.save(state, Position(1, 0.0), context.config, None)
        checkpoints.finish()
        restored, _ = checkpoints.restore(fresh, context.config)
    for actual, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(actual, other)


def test_non_finite_memory_is_reported():
    _, state, _ = made("cross_batch_memory")
    assert health.first_part_not_finite(state) is None
    broken = state.loss_memory["local"] | {"x": state.loss_memory["local"]["x"] * jnp.nan}
    state = state.replace(loss_memory=state.loss_memory | {"local": broken})
    assert health.first_part_not_finite(state) == "loss_memory/local/x"


def test_loss_settings_are_parsed_and_stored():
    parsed = command.parse(["--exp=debug", "--loss.name=cross_batch_memory", "--loss.size=8"])
    assert parsed.loss == CrossBatchMemory(size=8)
    stored = configuration.to_dict(parsed)
    assert stored["loss"] == {
        "name": "cross_batch_memory", "local_weight": 0.5, "fused_weight": 0.5, "size": 8,
        "margin": 0.5, "weight": 1.0, "warmup": 0,
    }  # fmt: skip
    assert configuration.from_dict({"loss": stored["loss"]}).loss == parsed.loss


def test_descriptor_dimensions():
    context, state, _ = made("two_centres")
    blocks, _ = descriptors_of(context, state, tiny.batch(ROWS))
    assert {name: each.shape[1] for name, each in blocks.items()} == dims(context.networks.embedder)
