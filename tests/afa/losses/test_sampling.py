"""Losses with random numbers: distributions, expectations, and the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import near
from loss_cases import CASES, LABELS, batches, evaluate, gradients_of, initial, unit
from loss_references import Given, distance_probabilities, triplet

from afa.losses.base import pairs
from afa.losses.norm_softmax import NormSoftmax
from afa.losses.proxy_synthesis import draw
from afa.losses.triplet import Triplet, sampled

DRAWS = 4000
WEIGHTED = "triplet, distance-weighted"


def keys(count=DRAWS):
    return jax.random.split(jax.random.key(7), count)


@pytest.mark.parametrize("name", [WEIGHTED, "proxy_synthesis"])
def test_the_key_decides(name):
    loss, step = CASES[name], batches(1)[0]
    values = [evaluate(loss, initial(loss), step, seed)[0] for seed in (0, 0, 1, 2)]
    assert values[0] == values[1]
    assert len(set(values)) == 3


@pytest.mark.parametrize("name", [name for name in CASES if name not in (
    WEIGHTED, "proxy_synthesis", "proxy_synthesis, few")])  # fmt: skip
def test_other_losses_do_not_read_the_key(name):
    loss, step = CASES[name], batches(1)[0]
    values = [evaluate(loss, initial(loss, seed=5), step, seed)[0] for seed in (0, 1)]
    assert values[0] == values[1]


# ---- distance-weighted mining --------------------------------------------------------------------


def test_weights_equal_the_reference():
    """Also where every negative is beyond the upper bound: the last row is opposite to all."""
    x = np.concatenate([unit(0, 7, 6), np.zeros((1, 6), np.float32)])
    x[:7, 0] += 2
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    x[7, 0] = -1
    loss = Triplet(mining="distance_weighted", cutoff=0.6, upper_bound=1.3)
    _, negative = pairs(jnp.asarray(LABELS))
    found = np.asarray(loss.weights(jnp.asarray(x @ x.T), negative, 6))
    expected = np.zeros((8, 8))
    for i in range(8):
        for j, weight in distance_probabilities(x.astype(np.float64), LABELS, i, loss).items():
            expected[i, j] = weight
    near(found, expected, 1e-4)
    assert len(np.unique(expected[7][expected[7] > 0])) == 1
    assert (expected[:7] == 0).sum() > 7 * 3 - 7


def test_frequencies_of_the_sampled_negatives():
    """Within five standard deviations; negatives of weight 0 never occur."""
    weights = np.array([[0, 0.5, 0, 0.2, 0.3, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0],
                        [1 / 3, 0, 1 / 3, 0, 1 / 3, 0], [0.9, 0.1, 0, 0, 0, 0],
                        [0, 0.01, 0, 0, 0.99, 0]])  # fmt: skip
    found = jax.jit(jax.vmap(sampled, (0, None)))(keys(), jnp.asarray(weights, jnp.float32))
    for a, row in enumerate(weights):
        for p in range(6):  # independently for every positive
            count = np.bincount(np.asarray(found[:, a, p]), minlength=6)
            assert (count[row == 0] == 0).all()
            deviation = np.sqrt(DRAWS * row * (1 - row))
            assert (np.abs(count - DRAWS * row) <= 5 * deviation + 1e-9).all()
    one, other = np.asarray(found[:, 3, 0]), np.asarray(found[:, 3, 1])
    assert abs(np.mean(one == other) - 1 / 3) < 5 * np.sqrt(2 / 9 / DRAWS)


def test_expected_loss_and_gradient_equal_the_reference():
    """The mean over random keys, within five standard errors."""
    loss, (x, y, proxies) = CASES[WEIGHTED], batches(1, 2)[0]
    free = {"x": jnp.asarray(x), "proxies": jnp.asarray(proxies), "params": {}}
    each = jax.vmap(lambda key: gradients_of(loss)(free, {}, jnp.asarray(y), key))
    (values, _), gradients = jax.jit(each)(keys())

    def on_sphere(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    wide = x.astype(np.float64)
    given = Given(at=on_sphere(wide))

    def reference(rows):
        return triplet(on_sphere(rows), y, None, loss, given)

    def agree(samples, expected):
        samples = np.asarray(samples, np.float64)
        error = samples.std(axis=0) / np.sqrt(len(samples))
        assert (np.abs(samples.mean(axis=0) - expected) <= 5 * error + 1e-5).all()

    agree(values, reference(wide))
    assert np.std(values) > 0.01
    expected = np.zeros_like(wide)
    for index in np.ndindex(wide.shape):
        moved = [wide.copy(), wide.copy()]
        moved[0][index] += 1e-6
        moved[1][index] -= 1e-6
        expected[index] = (reference(moved[0]) - reference(moved[1])) / 2e-6
    agree(gradients["x"], expected)


# ---- Proxy Synthesis -----------------------------------------------------------------------------


def test_synthetic_pairs_are_of_different_classes_and_uniform():
    rate, i, j = jax.jit(jax.vmap(lambda key: draw(key, jnp.asarray(LABELS), 10, 0.4)))(keys())
    np.testing.assert_array_equal(i, np.tile(np.arange(10) % 8, (DRAWS, 1)))
    assert (LABELS[np.asarray(i)] != LABELS[np.asarray(j)]).all()
    for row in range(10):
        others = np.flatnonzero(LABELS[row % 8] != LABELS)
        count = np.bincount(np.asarray(j[:, row]), minlength=8)[others]
        share = 1 / len(others)
        assert (np.abs(count / DRAWS - share) < 5 * np.sqrt(share * (1 - share) / DRAWS)).all()
    # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2 a + 1)).
    assert abs(np.mean(rate) - 0.5) < 5 * np.std(rate) / np.sqrt(DRAWS)
    near(np.var(rate), 1 / (4 * 1.8), 0.05)
    assert ((np.asarray(rate) >= 0) & (np.asarray(rate) <= 1)).all()


def test_a_batch_of_one_class_has_no_synthetic_rows():
    loss = CASES["proxy_synthesis"]
    x, _, proxies = batches(1)[0]
    step = (x, np.full(len(x), 3, np.int32), proxies)
    softmax = evaluate(NormSoftmax(temperature=1 / 8), initial(loss), step)
    found = evaluate(loss, initial(loss), step)
    near(found[0], softmax[0])
    near(found[1]["x"], softmax[1]["x"])
