"""Metric losses: values and gradients against references in NumPy, published settings, names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import near
from loss_cases import (
    CASES,
    CLASSES,
    DEFAULTS,
    LABELS,
    SETTINGS,
    after_steps,
    batches,
    evaluate,
    initial,
    lengths,
    unit,
)
from loss_references import REFERENCES, Given

from afa.errors import UserError
from afa.losses import LOSSES, base, named
from afa.losses.norm_softmax import NormSoftmax
from afa.losses.proxy_synthesis import ProxySynthesis, draw
from afa.losses.triplet import Triplet

HISTORY = 5  # steps before the one that is compared; the memories hold less


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def on_sphere(x):
    return x / np.sqrt(np.sum(np.square(x), axis=-1, keepdims=True))


def reference_of(loss, history, y, seed, at):
    """Returns the reference as a function of the free arrays before normalisation."""
    given = Given(at=on_sphere(at), history=[
        (on_sphere(wide(x)), labels, on_sphere(wide(p))) for x, labels, p in history
    ])  # fmt: skip
    if isinstance(loss, ProxySynthesis):
        count = max(round(loss.mu * len(y)), 1)
        drawn = draw(jax.random.key(seed), jnp.asarray(y), count, loss.alpha)
        given.drawn = [np.asarray(each) for each in drawn]

    def value(free):
        given.centres = free["params"].get("centres")
        x, p = on_sphere(free["x"]), on_sphere(free["proxies"])
        return REFERENCES[loss.name](x, y, p, loss, given)

    return value


def differences(function, free, step=1e-6):
    """Gradient by central differences."""

    def of(leaf):
        found = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            before, ends = leaf[index], []
            for sign in (1, -1):
                leaf[index] = before + sign * step
                ends.append(function(free))
            leaf[index] = before
            found[index] = (ends[0] - ends[1]) / (2 * step)
        return found

    return jax.tree.map(of, free)


def case_of(name, seed):
    """Returns the loss, its state after some steps, the next step and the reference."""
    loss, (x, y, proxies) = CASES[name], batches(1, 10 * seed)[0]
    state = initial(loss, seed=seed)
    history = batches(HISTORY, 100 + seed) if state.memory else []
    state = after_steps(loss, state, history)
    free = {"x": wide(x), "proxies": wide(proxies), "params": wide(state.params)}
    return loss, state, (x, y, proxies), reference_of(loss, history, y, seed, free["x"]), free


# Distance-weighted mining is compared in expectation, in test_sampling.
EXACT = [name for name, loss in CASES.items()
         if not (isinstance(loss, Triplet) and loss.mining == "distance_weighted")]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_value_and_gradient_equal_the_reference(name):
    loss, state, step, reference, free = case_of(name, seed=0)
    value, gradients, _ = evaluate(loss, state, step)
    near(value, reference(free), 2e-5)
    expected = differences(reference, free)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert largest > 1e-3
    for actual, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, other, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", EXACT)
def test_value_equals_the_reference(name, seed):
    loss, state, step, reference, free = case_of(name, seed)
    near(evaluate(loss, state, step, seed)[0], reference(free), 2e-5)


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_gradient_step_lowers_the_loss(name):
    loss, (x, y, proxies) = DEFAULTS[name], batches(1, 3)[0]
    state = initial(loss)
    start, gradients, _ = evaluate(loss, state, (x, y, proxies))
    gradient = gradients["x"]
    moved, _, _ = evaluate(
        loss, state, (x - 1e-3 * gradient / np.linalg.norm(gradient), y, proxies)
    )
    assert moved < start


@pytest.mark.parametrize("name", [name for name, loss in CASES.items() if loss.uses_proxies])
def test_only_the_proxy_of_the_class_attracts(name):
    """Detects wrong labels, a shifted class axis and a missing last class."""
    loss, proxies = CASES[name], lengths(1, CLASSES)
    x = np.broadcast_to(unit(2, 1), (len(LABELS), proxies.shape[1]))
    y = np.full(len(LABELS), CLASSES - 1, np.int32)
    _, gradients, _ = evaluate(loss, initial(loss), (x, y, proxies))
    # Only the part across the proxy counts, because proxies are normalised.
    towards = x[0] - np.sum(x[0] * on_sphere(proxies), 1, keepdims=True) * on_sphere(proxies)
    change = np.sum(gradients["proxies"] * towards, axis=1)
    assert change[-1] < 0
    assert (change[:-1] > 0).all()


@pytest.mark.parametrize("name", [name for name, loss in CASES.items() if not loss.uses_proxies])
def test_losses_without_proxies_do_not_read_them(name):
    loss, (x, y, proxies) = CASES[name], batches(1, 4)[0]
    value, gradients, _ = evaluate(loss, initial(loss), (x, y, proxies))
    other, _, _ = evaluate(loss, initial(loss), (x, y, -proxies))
    assert value == other
    assert (gradients["proxies"] == 0).all()


# ---- ArcFace -------------------------------------------------------------------------------------


@jax.jit
def arcface(rows, proxies):
    labels, key = jnp.zeros(len(rows), jnp.int32), jax.random.key(0)
    return CASES["arcface"].apply(base.State(), rows, labels, proxies, key)[0]


@jax.jit
@jax.grad
def gradient_at(cosine):
    return arcface(jnp.stack([cosine, 0.0])[None], jnp.eye(2))


# Cosines beyond 1 happen by rounding; the gradient of arccos is infinite at 1.
@pytest.mark.parametrize("cosine", [1.0, 1.0 + 1e-6, 1 - 1e-7, 0.5, -0.9, -1.0, -1.0 - 1e-6])
def test_gradient_of_arcface_is_finite_and_not_positive(cosine):
    gradient = float(gradient_at(jnp.float32(cosine)))
    # At most the scale times 1 + sin m / sqrt(epsilon of the root).
    scale, margin = SETTINGS["arcface"].values()
    assert -scale * (1 + np.sin(margin) / np.sqrt(1e-9)) <= gradient <= 0


def test_arcface_loss_increases_with_the_angle():
    """The further from the proxy, the larger the loss, also beyond pi - m."""
    angles = np.linspace(0.01, np.pi - 0.01, 60, dtype=np.float32)
    rows = np.stack([np.cos(angles), np.sin(angles)], 1)
    proxies = np.array([[1, 0], [0, 0]], np.float32)
    assert (np.diff([float(arcface(row[None], proxies)) for row in rows]) > 0).all()


def test_losses_with_a_margin_of_zero_are_a_softmax():
    step = batches(1, 5)[0]
    softmax, _, _ = evaluate(NormSoftmax(temperature=1 / 8), base.State(), step)
    for name in ("arcface", "cosface"):
        plain = dataclasses.replace(CASES[name], margin=0.0)
        near(evaluate(plain, base.State(), step)[0], softmax, 1e-4)


# ---- settings ------------------------------------------------------------------------------------

PUBLISHED = {
    "norm_softmax": {"temperature": 0.05},
    "proxy_nca": {"temperature": 1 / 9},
    "arcface": {"scale": 64.0, "margin": 0.5, "centres": 1},
    "cosface": {"scale": 64.0, "margin": 0.35},
    "soft_triple": {"centres": 10, "gamma": 0.1, "scale": 20.0, "tau": 0.2, "margin": 0.01},
    "proxy_anchor": {"scale": 32.0, "margin": 0.1},
    "proxy_synthesis": {"scale": 23.0, "alpha": 0.4, "mu": 1.0},
    "memvir": {"scale": 23.0, "steps": 45, "gap": 10, "warmup": 0},
    "contrastive": {"margin": 0.5},
    "cross_batch_memory": {"size": 8192, "margin": 0.5, "weight": 1.0, "warmup": 0},
    "triplet": {"margin": 0.1, "mining": "hard", "cutoff": 0.5, "upper_bound": 1.4},
    "lifted_structure": {"margin": 1.0},
    "multi_similarity": {"alpha": 2.0, "beta": 50.0, "threshold": 0.5, "margin": 0.1},
    "circle": {"gamma": 256.0, "margin": 0.25},
    "nt_xent": {"temperature": 0.1},
    "supcon": {"temperature": 0.1},
    "smooth_ap": {"tau": 0.01},
}
SHARED = {field.name for field in dataclasses.fields(base.Loss)}


def test_every_loss_has_its_published_settings():
    own = {
        name: {k: v for k, v in dataclasses.asdict(loss()).items() if k not in SHARED}
        for name, loss in LOSSES.items()
    }
    assert own == PUBLISHED


def test_every_loss_has_a_reference_and_a_case():
    assert list(LOSSES) == list(REFERENCES) == list(SETTINGS)


def test_named_loss_keeps_the_block_weights():
    before = NormSoftmax(local_weight=0.25, fused_weight=0.0, temperature=0.3)
    assert named("norm_softmax", before) is before
    assert named("arcface", before) == LOSSES["arcface"](local_weight=0.25, fused_weight=0.0)


def test_posterior_temperature_is_that_of_the_class_head_loss():
    found = {name: loss.posterior_temperature for name, loss in CASES.items()}
    assert {name: value for name, value in found.items() if value != 0.05} == {
        "norm_softmax": 0.2, "proxy_nca": 0.15, "arcface": 1 / 8, "cosface": 1 / 8,
        "proxy_anchor": 1 / 8, "proxy_synthesis": 1 / 8, "proxy_synthesis, few": 1 / 8,
        "memvir": 1 / 8, "memvir, no gap": 1 / 8,
    }  # fmt: skip
    assert {name for name, value in found.items() if value != 0.05} == {
        name for name, loss in CASES.items() if loss.uses_proxies
    }


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("tripplet", "triplet"), ("smoothap", "smooth_ap"), ("softtriple", "soft_triple"),
     ("xent", "nt_xent"), ("proxy-anchor", "proxy_anchor")],
)  # fmt: skip
def test_unknown_loss_is_an_error(name, nearest):
    with pytest.raises(UserError) as caught:
        named(name, CASES["triplet"])
    assert str(caught.value) == (
        f"loss.name={name!r} is unknown; did you mean {nearest!r}? (allowed: arcface, circle, "
        "contrastive, cosface, cross_batch_memory, lifted_structure, memvir, multi_similarity, "
        "norm_softmax, nt_xent, proxy_anchor, proxy_nca, proxy_synthesis, smooth_ap, soft_triple, "
        "supcon, triplet)"
    )
