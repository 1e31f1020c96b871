"""Values and gradients of the metric losses stay finite at degenerate points."""

import jax
import numpy as np
import pytest
from loss_cases import CASES, CLASSES, DEFAULTS, DIM, evaluate, initial, unit

ROWS = 5  # as many as classes, so that few programs are compiled
SAME = np.tile(unit(3, 1), (ROWS, 1))
PROXIES = unit(1, CLASSES)
EACH = np.arange(ROWS, dtype=np.int32)
TWICE = np.array([0, 0, 1, 1, 2], np.int32)
POINTS = {
    "identical rows": (SAME, TWICE, PROXIES),
    "rows on their proxies": (PROXIES, EACH, PROXIES),
    "rows opposite to their proxies": (-PROXIES, EACH, PROXIES),
    "opposite rows": (np.array([1, 1, -1, -1, 1], np.float32)[:, None] * SAME, TWICE, PROXIES),
    "no class with a positive": (unit(4, ROWS), EACH, PROXIES),
    "one class alone": (unit(5, ROWS), np.full(ROWS, 2, np.int32), PROXIES),
    "one class alone, identical": (SAME, np.full(ROWS, 4, np.int32), PROXIES),
    "identical rows and proxies": (SAME, TWICE, np.tile(unit(3, 1), (CLASSES, 1))),
    "rows of zero": (np.zeros((ROWS, DIM), np.float32), TWICE, PROXIES),
    "one row": (unit(6, 1), np.array([1], np.int32), PROXIES),
}
LOSSES = DEFAULTS | {name: loss for name, loss in CASES.items() if "," in name}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_finite(name):
    """From the initial state, then with the same rows in the memory."""
    loss = LOSSES[name]
    for point, step in POINTS.items():
        state = initial(loss, rows=len(step[0]))
        for number in range(3 if state.memory else 1):
            value, gradients, state = evaluate(loss, state, step, seed=number)
            assert np.isfinite(value), point
            for leaf in jax.tree.leaves((gradients, state)):
                assert np.isfinite(leaf).all(), point


@pytest.mark.parametrize("name", [name for name in LOSSES if "centre" in name or "soft" in name])
def test_identical_centres_have_a_finite_gradient(name):
    loss = LOSSES[name]
    state = initial(loss, rows=ROWS)
    for fill in (0.0, 1.0):
        equal = state.replace(params=jax.tree.map(lambda leaf: 0 * leaf + fill, state.params))  # noqa: B023
        _, gradients, _ = evaluate(loss, equal, POINTS["identical rows"])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


PAIRS = ("triplet", "triplet, semi-hard", "triplet, distance-weighted", "contrastive", "supcon",
         "multi_similarity", "cross_batch_memory", "lifted_structure", "circle", "nt_xent",
         "smooth_ap")  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_loss_is_zero_without_positives_and_close_negatives(name):
    far = np.eye(ROWS, DIM, dtype=np.float32)
    assert evaluate(LOSSES[name], initial(LOSSES[name]), (far, EACH, PROXIES))[0] == 0


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in
                                  ("contrastive", "cross_batch_memory", "supcon",
                                   "multi_similarity")])  # fmt: skip
def test_loss_is_zero_without_negatives(name):
    """Other losses also pull positives together when there is nothing to push away."""
    step = POINTS["one class alone"]
    assert evaluate(LOSSES[name], initial(LOSSES[name]), step)[0] == 0
