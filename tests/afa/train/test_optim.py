"""Schedules, optimisers, moving averages, and the training state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from afa.config import ExperimentConfig, OptimConfig, with_changes
from afa.errors import UserError
from afa.losses.norm_softmax import NormSoftmax
from afa.models.embedder import Embedder
from afa.models.networks import Networks
from afa.train import optim
from afa.train.state import TrainState, apply_gradients, checkpoint_id, create


def near(value, expected, tolerance=1e-6):
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=1e-6)


# ---- learning rate -----------------------------------------------------------------------------


def rates(config, steps=100, epoch=10, count=100):
    schedule = optim.learning_rate(config, 2.0, steps, epoch)
    return np.array([np.asarray(schedule(jnp.asarray(i))) for i in range(count)])


def test_warm_up_rises_to_the_peak_and_the_cosine_falls_to_zero():
    found = rates(OptimConfig(warmup="10%"), count=101)
    near(found[:10], 0.2 + np.arange(10) * 0.18)
    near(found[10], 2.0)
    near(found[10:], 1 + np.cos(np.pi * np.arange(91) / 90), 1e-5)
    assert found[0] > 0
    near(found[-1], 0.0)


@pytest.mark.parametrize(("warmup", "steps"), [("7", 7), ("0.5ep", 5), ("20%", 20), ("0", 0)])
def test_warm_up_in_every_unit(warmup, steps):
    found = rates(OptimConfig(warmup=warmup, schedule="constant"))
    assert (found[:steps] < 2).all()
    near(found[steps:], np.full(100 - steps, 2.0))


def test_linear_decay():
    near(rates(OptimConfig(warmup="0", schedule="linear")), 2 * (1 - np.arange(100) / 100), 1e-5)


def test_accumulated_steps_count_once():
    """100 steps with 4 gradients each are 25 updates; the schedule counts updates."""
    found = rates(OptimConfig(warmup="20%", accumulate=4, schedule="linear"), count=26)
    near(found[5], 2.0)
    assert (found[:5] < 2).all()
    near(found[25], 0.0)


def test_malformed_warm_up_is_refused():
    with pytest.raises(UserError, match=r"optim\.warmup='soon' is not a duration"):
        optim.learning_rate(OptimConfig(warmup="soon"), 1.0, 10, 5)


# ---- optimisers --------------------------------------------------------------------------------

PARAMS = {
    "conv": {"kernel": jnp.full((2, 3), 0.5), "bias": jnp.full(3, 0.5)},
    "norm": {"scale": jnp.ones(3)},
    "power": jnp.asarray(3.0),
    "class_head": jnp.ones((2, 2)),
}


def settings(**changes):
    base = {"optim.warmup": "0", "optim.schedule": "constant", "optim.clip": 0.0}
    changes = {f"optim.{name}": value for name, value in changes.items()}
    return with_changes(ExperimentConfig(), **(base | changes))


def walk(config, gradients, network="embedder"):
    """Parameters after every gradient."""
    optimiser = optim.optimisers(config, 100, 100, 10)[network]
    params, state, path = PARAMS, optimiser.init(PARAMS), []
    update = jax.jit(optimiser.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def gradients(count, size=1.0):
    draw = np.random.default_rng(0)
    return [
        jax.tree.map(lambda p: jnp.asarray(size * draw.normal(size=p.shape), jnp.float32), PARAMS)
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", optim.OPTIMISERS)
def test_weight_decay_applies_only_to_kernels(name):
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    config = settings(name=name, learning_rate=0.1, weight_decay=0.5)
    after = walk(config, [zero])[0]
    assert (after["conv"]["kernel"] < PARAMS["conv"]["kernel"]).all()
    kept = {**after, "conv": {"bias": after["conv"]["bias"]}}
    jax.tree.map(
        np.testing.assert_array_equal, kept, {**PARAMS, "conv": {"bias": jnp.full(3, 0.5)}}
    )
    without = walk(settings(name=name, learning_rate=0.1, weight_decay=0.0), [zero])[0]
    jax.tree.map(np.testing.assert_array_equal, without, PARAMS)


def test_sgd_has_decoupled_weight_decay():
    """Two steps, computed by hand: m = 0.9 m + g; w = w - rate (g + 0.9 m) - rate decay w."""
    rate, decay, momentum = 0.1, 0.5, 0.9
    first, second = gradients(2)
    config = settings(name="sgd", learning_rate=rate, weight_decay=decay)
    path = walk(config, [first, second])
    g1, g2, w0 = (each["conv"]["kernel"] for each in (first, second, PARAMS))
    w1 = w0 - rate * (g1 + momentum * g1) - rate * decay * w0
    w2 = w1 - rate * (g2 + momentum * (momentum * g1 + g2)) - rate * decay * w1
    near(path[0]["conv"]["kernel"], w1, 1e-5)
    near(path[1]["conv"]["kernel"], w2, 1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_accumulating_equals_averaging(name, clip):
    small = gradients(6)
    config = settings(name=name, learning_rate=0.1, clip=clip, accumulate=3)
    path = walk(config, small)
    jax.tree.map(np.testing.assert_array_equal, path[1], PARAMS)  # still accumulating
    jax.tree.map(np.testing.assert_array_equal, path[4], path[2])
    mean = [
        jax.tree.map(lambda *each: sum(each) / 3, *small[begin : begin + 3]) for begin in (0, 3)
    ]
    averaged = walk(settings(name=name, learning_rate=0.1, clip=clip), mean)
    for actual, expected in zip((path[2], path[5]), averaged, strict=True):
        jax.tree.map(lambda a, b: near(a, b, 1e-5), actual, expected)


def test_clipping_keeps_the_direction_and_limits_the_norm():
    long = gradients(1, size=50.0)[0]
    length = optax.tree.norm(long)
    short = jax.tree.map(lambda g: g / length, long)
    config = {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}
    clipped = walk(settings(clip=1.0, **config), [long])[0]
    expected = walk(settings(clip=0.0, **config), [short])[0]
    jax.tree.map(lambda a, b: near(a, b, 1e-5), clipped, expected)
    unclipped = walk(settings(clip=0.0, **config), [long])[0]
    assert np.abs(unclipped["power"] - expected["power"]) > 0.1
    # Gradients below the limit are unchanged.
    jax.tree.map(
        np.testing.assert_array_equal,
        walk(settings(clip=2.0, **config), [short])[0],
        expected,
    )


def test_networks_have_their_own_learning_rates():
    config = settings(learning_rate=0.1, generator_learning_rate=0.02, weight_decay=0.0)
    config = with_changes(config, **{"optim.discriminator_learning_rate": 0.003})
    for network, rate in (("embedder", 0.1), ("generator", 0.02), ("discriminator", 0.003)):
        moved = walk(config, gradients(1), network)[0]
        # The first step of Adam has the size of the learning rate for any gradient.
        near(np.abs(moved["conv"]["bias"] - PARAMS["conv"]["bias"]), np.full(3, rate), 1e-3)


def test_only_the_discriminator_has_a_low_momentum():
    made = optim.optimisers(ExperimentConfig(), 10, 10, 5)
    gradient = {"kernel": jnp.full(1, 0.5)}  # not clipped
    for network, share in (("generator", 0.1), ("discriminator", 0.5)):
        _, state = made[network].update(gradient, made[network].init(gradient), gradient)
        near(optax.tree.get(state, "mu")["kernel"], [share * 0.5])


def test_a_non_finite_gradient_is_not_clipped_away():
    bad = gradients(1)[0] | {"power": jnp.asarray(jnp.nan)}
    after = walk(settings(clip=1.0), [bad])[0]
    assert not np.isfinite(after["power"])
    assert not np.isfinite(optax.tree.norm(bad))


def test_unknown_optimiser_is_refused():
    with pytest.raises(UserError) as caught:
        optim.optimisers(settings(name="adamv"), 10, 10, 5)
    assert str(caught.value) == (
        "optim.name='adamv' is unknown; did you mean 'adamw'? (allowed: adamw, lamb, lion, sgd)"
    )


# ---- moving average ----------------------------------------------------------------------------


def test_moving_average_warms_up():
    average, now = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    weights = [
        float(optim.move_average(average, now, 0.99, jnp.asarray(n))["w"][0])
        for n in (0, 1, 8, 1500)
    ]
    near(weights, [1 - 1 / 10, 1 - 2 / 11, 1 - 9 / 18, 1 - 0.99], 1e-5)


def test_moving_average_can_be_off():
    now = {"w": jnp.arange(3.0)}
    moved = optim.move_average({"w": jnp.ones(3)}, now, 0.0, jnp.asarray(5))
    np.testing.assert_array_equal(moved["w"], now["w"])


# ---- the state ---------------------------------------------------------------------------------


class FewNumbers(Networks):
    """Networks with a few variables and no modules."""

    embedder = Embedder(None, 4, 2, 3, 0.1)

    def init(self, key, image_size) -> dict[str, Any]:
        def network(key):
            return {"params": {"kernel": jax.random.normal(key, (2, 2))}, "batch_stats": {}}

        names = ("embedder", "generator", "discriminator")
        return dict(zip(names, map(network, jax.random.split(key, 3)), strict=True))


def few(**changes):
    networks = object.__new__(FewNumbers)
    optimisers = optim.optimisers(settings(**changes), 10, 10, 5)
    return create(networks, optimisers, 4, 8, NormSoftmax(), 16), optimisers


def test_the_initial_state_depends_only_on_the_seed():
    state, optimisers = few()
    again, _ = few()
    for actual, other in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(actual, other)
    other = create(object.__new__(FewNumbers), optimisers, 5, 8, NormSoftmax(), 16)
    assert (other.variables["generator"]["params"]["kernel"]
            != state.variables["generator"]["params"]["kernel"]).all()  # fmt: skip
    assert int(state.step) == 0
    assert set(state.average) == {"embedder", "generator"}
    assert set(state.opt_state) == set(state.variables)


def test_the_average_shares_no_memory_with_the_weights():
    """An alias would be donated twice."""
    state, _ = few()
    leaves = jax.tree.leaves(state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size}) == len(
        [leaf for leaf in leaves if leaf.size]
    )


def test_apply_gradients_updates_one_network():
    state, optimisers = few(name="sgd", learning_rate=0.1, weight_decay=0.0)
    state = state.replace(updates=state.updates | {"embedder": jnp.asarray(3)})
    gradient = {"kernel": jnp.ones((2, 2))}
    before = state.variables["embedder"]["params"]["kernel"]
    stats = {"mean": jnp.ones(2)}
    state = state.replace(
        variables=state.variables
        | {"embedder": {"params": {"kernel": before}, "batch_stats": {"mean": jnp.zeros(2)}}},
        average=state.average
        | {"embedder": {"params": {"kernel": before}, "batch_stats": {"mean": jnp.zeros(2)}}},
    )
    after, metrics = apply_gradients(
        state, optimisers["embedder"], "embedder", gradient, stats, 0.999
    )
    near(metrics["embedder_gradient_norm"], 2.0)
    now = after.variables["embedder"]
    near(now["params"]["kernel"], before - 0.19, 1e-5)  # Nesterov: 0.1 (1 + 0.9)
    np.testing.assert_array_equal(now["batch_stats"]["mean"], np.ones(2))
    d = 4 / 13
    near(after.average["embedder"]["params"]["kernel"], before - (1 - d) * 0.19, 1e-5)
    near(after.average["embedder"]["batch_stats"]["mean"], np.full(2, 1 - d), 1e-5)
    for each in ("generator", "discriminator"):
        assert after.variables[each] is state.variables[each]
        assert after.opt_state[each] is state.opt_state[each]
    assert int(after.step) == 0  # the steps count, not apply_gradients
    assert {name: int(n) for name, n in after.updates.items()} == {
        "embedder": 4, "generator": 0, "discriminator": 0,
    }  # fmt: skip


def initial_share(updates: int, decay: float) -> float:
    """Weight of the initial parameters in the average: the product of all decays."""
    return float(np.prod([min(decay, (1 + n) / (10 + n)) for n in range(updates)]))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("start", [0, 280])
@pytest.mark.parametrize("network", ["embedder", "generator"])
def test_the_average_counts_the_updates_of_its_network(network, start, accumulate):
    """For any first step of the network and any number of accumulated gradients."""
    state, optimisers = few(accumulate=accumulate)
    state = state.replace(step=jnp.asarray(start, jnp.int32))
    average = state.average[network]["params"]["kernel"]
    first = state.variables[network]["params"]["kernel"]
    decays: list[float] = []
    move = jax.jit(
        lambda s, g: apply_gradients(s, optimisers[network], network, {"kernel": g}, None, 0.98)[0]
    )
    for step in range(40 * accumulate):
        before = state.variables[network]["params"]["kernel"]
        state = move(state, jnp.full((2, 2), 1.0 + step % 3))
        state = state.replace(step=state.step + 1)
        now = state.variables[network]["params"]["kernel"]
        if np.array_equal(now, before):  # still accumulating gradients
            np.testing.assert_array_equal(state.average[network]["params"]["kernel"], average)
        else:
            d = min(0.98, (1 + len(decays)) / (10 + len(decays)))
            average, decays = d * average + (1 - d) * now, [*decays, d]
        near(state.average[network]["params"]["kernel"], average, 1e-5)
        average = state.average[network]["params"]["kernel"]
    assert len(decays) == int(state.updates[network]) == 40
    assert np.prod(decays) == pytest.approx(initial_share(40, 0.98))
    assert initial_share(40, 0.98) < 1e-5
    assert np.abs(state.average[network]["params"]["kernel"] - first).min() > 0.001


def test_batch_statistics_are_unchanged_without_new_ones():
    state, optimisers = few()
    after, _ = apply_gradients(
        state, optimisers["discriminator"], "discriminator", {"kernel": jnp.ones((2, 2))}, None, 0.0
    )
    assert after.variables["discriminator"]["batch_stats"] == {}
    assert after.average is state.average


def test_search_uses_averages_if_available():
    state, _ = few()
    moved = state.replace(average=jax.tree.map(lambda x: x + 1, state.average))
    found = moved.search_variables()
    assert found["embedder"] is moved.average["embedder"]
    assert found["discriminator"] is moved.variables["discriminator"]


def test_checkpoint_id_depends_on_the_search_variables():
    state, _ = few()
    first = checkpoint_id(state)
    assert first.startswith("step-0-")
    assert len(first) == len("step-0-") + 16
    raw = state.variables | {"embedder": jax.tree.map(lambda x: x + 1, state.variables["embedder"])}
    assert checkpoint_id(dataclasses.replace(state, variables=raw)) == first
    average = jax.tree.map(lambda x: x + 1, state.average)
    assert checkpoint_id(dataclasses.replace(state, average=average)) != first
    assert isinstance(state, TrainState)
