"""The metric loss of a step: the weighted mean over the descriptor blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import near
from loss_cases import CASES, CLASSES, LABELS, unit
from loss_references import Given, proxy_anchor

from afa.losses import base, metric

DIMS = {"global": 3, "local": 4, "fused": 5}


def blocks_and_proxies():
    return (
        {name: jnp.asarray(unit(30 + dim, len(LABELS), dim)) for name, dim in DIMS.items()},
        {name: jnp.asarray(unit(40 + dim, CLASSES, dim)) for name, dim in DIMS.items()},
    )


@pytest.mark.parametrize(("local", "fused"), [(0.5, 0.25), (0.0, 0.5), (0.0, 0.0)])
def test_metric_loss_is_the_weighted_mean_over_blocks(local, fused):
    loss = dataclasses.replace(CASES["proxy_anchor"], local_weight=local, fused_weight=fused)
    blocks, proxies = blocks_and_proxies()
    weights = {"global": 1, "local": local, "fused": fused}
    expected = sum(
        weight
        * proxy_anchor(np.asarray(blocks[name]), LABELS, np.asarray(proxies[name]), loss, Given())
        for name, weight in weights.items()
    ) / sum(weights.values())
    key = jax.random.key(0)
    states = metric.init(loss, key, CLASSES, DIMS, len(LABELS))
    assert set(states) == {name for name, weight in weights.items() if weight > 0}
    found, after = metric.metric_loss(loss, states, blocks, jnp.asarray(LABELS), proxies, key)
    near(found, expected)
    assert jax.tree.leaves(after) == []


@pytest.mark.parametrize("name", ["triplet", "soft_triple", "arcface, 3 centres"])
def test_losses_without_proxies_train_the_class_head_separately(name):
    blocks, proxies = blocks_and_proxies()
    key = jax.random.key(0)
    states = metric.init(CASES[name], key, CLASSES, DIMS, len(LABELS))

    @jax.jit
    def gradients(blocks, proxies):
        def total(b, p):
            found = metric.metric_loss(CASES[name], states, b, jnp.asarray(LABELS), p, key)
            return found[0]

        return jax.grad(total, argnums=(0, 1))(blocks, proxies)

    for_rows, for_proxies = gradients(blocks, proxies)
    elsewhere, _ = gradients(blocks, jax.tree.map(jnp.negative, proxies))
    for each in blocks:
        near(for_rows[each], elsewhere[each], 1e-7)  # independent of the proxies
        assert np.abs(for_rows[each]).max() > 0
        assert np.abs(for_proxies[each]).max() > 0


def test_every_block_has_its_own_initial_state_and_key():
    loss = CASES["soft_triple"]
    same = dict.fromkeys(DIMS, 4)
    states = metric.init(loss, jax.random.key(0), CLASSES, same, len(LABELS))
    first, second, third = (np.asarray(each.params["centres"]) for each in states.values())
    assert not np.allclose(first, second) and not np.allclose(second, third)

    @dataclasses.dataclass(frozen=True)
    class Keys(base.Loss):
        def apply(self, state, x, y, proxies, key):
            return jax.random.uniform(key), base.State(memory={"key": jax.random.key_data(key)})

    blocks, proxies = blocks_and_proxies()
    found = functools.partial(
        metric.metric_loss, Keys(), dict.fromkeys(DIMS, base.State()), blocks, jnp.asarray(LABELS),
        proxies,
    )  # fmt: skip
    keys = {
        tuple(np.asarray(state.memory["key"]))
        for seed in (0, 1)
        for state in found(jax.random.key(seed))[1].values()
    }
    assert len(keys) == 6
