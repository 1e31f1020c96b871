"""Losses with a memory: what enters it, when it leaves, and what an empty memory means."""

import dataclasses

import jax
import numpy as np
import pytest
from arrays import near
from loss_cases import CASES, LABELS, after_steps, batches, evaluate, initial

from afa.losses import base
from afa.losses.contrastive import Contrastive
from afa.losses.cross_batch_memory import CrossBatchMemory
from afa.losses.memvir import MemVir
from afa.losses.norm_softmax import NormSoftmax

MEMORIES = [name for name in CASES if jax.tree.leaves(initial(CASES[name]).memory)]
# The same loss without a memory.
PLAIN = {"memvir": NormSoftmax(temperature=1 / 8), "cross_batch_memory": Contrastive(margin=0.2)}


def on_sphere(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_which_losses_have_a_memory():
    assert MEMORIES == [
        "memvir", "cross_batch_memory", "memvir, no gap", "cross_batch_memory, warm-up"
    ]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_an_empty_memory_has_no_effect(name):
    """MemVir also with a memory of fewer steps than the gap: three steps before the first is old
    enough."""
    loss = CASES[name]
    state, steps = initial(loss), batches(3)
    plain_steps = 1 + loss.gap if isinstance(loss, MemVir) else 1
    for number, step in enumerate(steps):
        value, gradients, state = evaluate(loss, state, step)
        expected, others, _ = evaluate(PLAIN[name], base.State(), step)
        if number < plain_steps:
            near(value, expected)
            near(gradients["x"], others["x"])
            near(gradients["proxies"], others["proxies"])
        else:
            assert abs(value - expected) > 1e-2


@pytest.mark.parametrize("name", MEMORIES)
def test_shapes_of_the_memory_are_fixed(name):
    state = initial(CASES[name])
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    after = after_steps(CASES[name], state, batches(6))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == shapes


def test_the_queue_has_the_newest_descriptors_first():
    loss, steps = CrossBatchMemory(size=20), batches(4)
    state = initial(loss)
    for number in range(4):
        state = after_steps(loss, state, steps[number : number + 1])
        newest = steps[number::-1]
        rows = np.concatenate([on_sphere(x) for x, _, _ in newest])[:20]
        labels = np.concatenate([y for _, y, _ in newest])[:20]
        near(state.memory["x"][: len(rows)], rows)
        np.testing.assert_array_equal(state.memory["y"][: len(labels)], labels)
        np.testing.assert_array_equal(state.memory["y"][len(labels) :], -1)


def test_a_queue_smaller_than_the_batch():
    loss, (step, after) = CrossBatchMemory(size=3, margin=0.2), batches(2)
    state = after_steps(loss, initial(loss), [step])
    np.testing.assert_array_equal(state.memory["y"], step[1][:3])
    assert np.isfinite(evaluate(loss, state, after)[0])


def test_memvir_replaces_the_oldest_step():
    loss, steps = MemVir(steps=2, gap=1), batches(6)
    state = after_steps(loss, initial(loss), steps)
    for slot in range(4):
        x, y, proxies = steps[slot + 4 if slot < 2 else slot]  # steps 4, 5, 2, 3
        near(state.memory["x"][slot], on_sphere(x))
        np.testing.assert_array_equal(state.memory["y"][slot], y)
        near(state.memory["proxies"][slot], on_sphere(proxies))


@pytest.mark.parametrize("loss", [CrossBatchMemory(size=99, margin=0.2), MemVir(steps=3, gap=0)])
def test_the_warmup_leaves_the_memory_empty(loss):
    """After the warm-up, the loss is that of a memory that starts there."""
    later = dataclasses.replace(loss, warmup=2)
    steps = batches(5)
    state, fresh = after_steps(later, initial(later), steps[:2]), initial(loss)
    for step in steps[2:]:
        value, _, state = evaluate(later, state, step)
        expected, _, fresh = evaluate(loss, fresh, step)
        near(value, expected, 1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_the_memory_depends_on_the_rows_alone(name):
    """An image enters once: the value for other rows does not change the memory from before."""
    loss, (first, second, other) = CASES[name], batches(3)
    state = after_steps(loss, initial(loss), [first])
    before = jax.tree.map(np.array, state)
    evaluate(loss, state, other)
    for actual, expected in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(actual, expected)
    after = evaluate(loss, state, second)[2]
    assert int(after.memory["count"]) == 2
    assert len(LABELS) == len(second[1])
