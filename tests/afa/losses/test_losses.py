"""Metric losses against NumPy, their gradients at degenerate points, and adversarial losses."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa.errors import UserError
from afa.losses import LOSSES, adversarial, base, metric, named
from afa.losses.norm_softmax import NormSoftmax
from afa.models.layers import l2_normalise

SETTINGS: dict[str, dict[str, Any]] = {
    "norm_softmax": {"temperature": 0.2},
    "arcface": {"scale": 8.0, "margin": 0.3},
    "proxy_anchor": {"scale": 8.0, "margin": 0.3},
    "multi_similarity": {"alpha": 3.0, "beta": 20.0, "threshold": 0.4, "margin": 0.3},
    "triplet": {"margin": 0.3},
    "contrastive": {"margin": 0.3},
    "supcon": {"temperature": 0.2},
}
CHOSEN = {name: LOSSES[name](**fields) for name, fields in SETTINGS.items()}
LABELS = np.array([0, 0, 2, 2, 2, 1, 4], np.int32)  # no rows of class 3; 1 and 4 have no positives
CLASSES = 5


def unit(seed, rows, dim=4):
    x = np.random.default_rng(seed).normal(size=(rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


X, PROXIES = unit(0, len(LABELS)), unit(1, CLASSES)


def near(value, expected, tolerance=1e-5):
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)


@functools.partial(jax.jit, static_argnums=0)
def compiled(loss, x, y, proxies):
    return loss.apply(base.State(), x, y, proxies)[0]


def value(loss, x, y, proxies):
    return compiled(loss, jnp.asarray(x), jnp.asarray(y), jnp.asarray(proxies))


@functools.cache
def gradients_of(name):
    """Value and gradients of a loss with respect to rows and proxies before normalisation."""

    def loss(x, y, proxies):
        return LOSSES[name]().apply(base.State(), l2_normalise(x), y, l2_normalise(proxies))[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))


# ---- reference implementations with loops ------------------------------------------------------


def cross_entropy(logits, y):
    return -np.log(np.exp(logits[y]) / np.exp(logits).sum())


def rows_of(y):
    for i, label in enumerate(y):
        others = [j for j in range(len(y)) if j != i]
        yield i, [j for j in others if y[j] == label], [j for j in others if y[j] != label]


def norm_softmax(x, y, p, c):
    return np.mean([cross_entropy(p @ x[i] / c.temperature, y[i]) for i in range(len(y))])


def arcface(x, y, p, c):
    losses = []
    for i, label in enumerate(y):
        cosine = p @ x[i]
        angle = np.arccos(cosine[label])
        beyond = angle + c.margin > np.pi
        turned = cosine[label] - c.margin * np.sin(c.margin)
        cosine[label] = turned if beyond else np.cos(angle + c.margin)
        losses.append(cross_entropy(c.scale * cosine, label))
    return np.mean(losses)


def proxy_anchor(x, y, p, c):
    positive_terms, negative_terms = [], []
    for label, proxy in enumerate(p):
        cosine = x @ proxy
        if (y == label).any():
            terms = np.exp(-c.scale * (cosine[y == label] - c.margin))
            positive_terms.append(np.log(1 + terms.sum()))
        negative_terms.append(np.log(1 + np.exp(c.scale * (cosine[y != label] + c.margin)).sum()))
    return np.mean(positive_terms) + np.mean(negative_terms)


def multi_similarity(x, y, p, c):
    s, losses = x @ x.T, []
    for i, positive, negative in rows_of(y):
        hard_positive = [j for j in positive if s[i, j] < max(s[i, negative]) + c.margin]
        hard_negative = [
            j for j in negative if positive and s[i, j] > min(s[i, positive]) - c.margin
        ]
        near_ = np.exp(-c.alpha * (s[i, hard_positive] - c.threshold)).sum()
        far = np.exp(c.beta * (s[i, hard_negative] - c.threshold)).sum()
        positive, negative = np.log(1 + near_) / c.alpha, np.log(1 + far) / c.beta
        losses.append(positive + negative)
    return np.mean(losses)


def triplet(x, y, p, c):
    s = x @ x.T
    return np.mean([
        max(0, max(s[i, negative]) - min(s[i, positive]) + c.margin)
        for i, positive, negative in rows_of(y)
        if positive and negative
    ])  # fmt: skip


def contrastive(x, y, p, c):
    s = x @ x.T
    positive_terms = [1 - s[i, j] for i, positive, _ in rows_of(y) for j in positive]
    negative_terms = [s[i, j] - c.margin for i, _, negative in rows_of(y) for j in negative]
    return np.mean(positive_terms) + np.mean([each for each in negative_terms if each > 0])


def supcon(x, y, p, c):
    s, losses = np.exp(x.astype(np.float64) @ x.T / c.temperature), []
    for i, positive, negative in rows_of(y):
        if positive:
            total = s[i, positive + negative].sum()
            losses.append(np.mean([-np.log(s[i, j] / total) for j in positive]))
    return np.mean(losses)


REFERENCES = {
    each.__name__: each
    for each in (
        norm_softmax, arcface, proxy_anchor, multi_similarity, triplet, contrastive, supcon
    )
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_numpy(name, seed):
    x, p = unit(10 + seed, len(LABELS)), unit(20 + seed, CLASSES)
    loss = CHOSEN[name]
    near(value(loss, x, LABELS, p), REFERENCES[name](x, LABELS, p, loss))


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_step_lowers_the_loss(name):
    start, (gradient, _) = gradients_of(name)(X, LABELS, PROXIES)
    moved, _ = gradients_of(name)(X - 1e-3 * gradient / np.linalg.norm(gradient), LABELS, PROXIES)
    assert float(moved) < float(start)


# ---- degenerate points -------------------------------------------------------------------------

SAME = np.tile(unit(3, 1), (6, 1))
TWICE = np.array([0, 0, 1, 1, 2, 2], np.int32)
ON = np.arange(6, dtype=np.int32) % CLASSES
POINTS = {
    "identical rows": (SAME, TWICE),
    "rows on their proxies": (PROXIES[ON], ON),
    "rows opposite to their proxies": (-PROXIES[ON], ON),
    "no class with a positive": (unit(4, 5), np.arange(5, dtype=np.int32)),
    "one class alone": (unit(5, 6), np.full(6, 2, np.int32)),
    "one class alone, identical": (SAME, np.full(6, 4, np.int32)),
    "one row": (unit(6, 1), np.array([1], np.int32)),
    "rows of zero": (np.zeros((6, 4), np.float32), TWICE),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_finite_at_degenerate_points(name, point):
    rows, labels = POINTS[point]
    found, gradients = gradients_of(name)(rows, labels, PROXIES)
    assert np.isfinite(found)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", ["triplet", "contrastive", "supcon", "multi_similarity"])
def test_loss_is_zero_without_positives(name):
    far = np.eye(4, dtype=np.float32)
    assert float(value(CHOSEN[name], far, np.arange(4, dtype=np.int32), PROXIES)) == 0


@jax.jit
@jax.grad
def gradient_at(cosine):
    rows = jnp.stack([cosine, 0.0])[None]
    return CHOSEN["arcface"].apply(base.State(), rows, jnp.zeros(1, jnp.int32), jnp.eye(2))[0]


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
    own = np.zeros(1, np.int32)
    losses = [float(value(CHOSEN["arcface"], row[None], own, proxies)) for row in rows]
    assert (np.diff(losses) > 0).all()


def test_arcface_without_margin_is_a_softmax():
    plain = dataclasses.replace(CHOSEN["arcface"], margin=0.0)
    softmax = NormSoftmax(temperature=1 / 8)
    near(value(plain, X, LABELS, PROXIES), value(softmax, X, LABELS, PROXIES), 1e-4)


def test_only_the_proxy_of_the_class_attracts():
    """Detects wrong labels, a shifted class axis and a missing last class."""
    for name in ("norm_softmax", "arcface", "proxy_anchor"):
        x, y = PROXIES[-1:], np.array([CLASSES - 1], np.int32)
        gradient = jax.grad(lambda p, x=x, y=y, name=name: value(CHOSEN[name], x, y, p))(
            jnp.asarray(PROXIES)
        )
        cotangent = np.asarray(gradient @ x[0])
        assert cotangent[-1] < 0, name
        assert (cotangent[:-1] > 0).all(), name


# ---- the weighted sum --------------------------------------------------------------------------


def blocks_and_proxies():
    names = ("global", "local", "fused")
    return (
        {name: jnp.asarray(unit(30 + i, len(LABELS), 3 + i)) for i, name in enumerate(names)},
        {name: jnp.asarray(unit(40 + i, CLASSES, 3 + i)) for i, name in enumerate(names)},
    )


@pytest.mark.parametrize(("local", "fused"), [(0.5, 0.25), (0.0, 0.5), (0.0, 0.0)])
def test_metric_loss_is_the_weighted_mean_over_blocks(local, fused):
    loss = dataclasses.replace(CHOSEN["proxy_anchor"], local_weight=local, fused_weight=fused)
    blocks, proxies = blocks_and_proxies()
    weights = {"global": 1, "local": local, "fused": fused}
    expected = sum(
        weight * proxy_anchor(np.asarray(blocks[name]), LABELS, np.asarray(proxies[name]), loss)
        for name, weight in weights.items()
    ) / sum(weights.values())
    states = metric.init(loss, jax.random.key(0), CLASSES, {"global": 3, "local": 4, "fused": 5})
    assert set(states) == {name for name, weight in weights.items() if weight > 0}
    found, after = metric.metric_loss(loss, states, blocks, jnp.asarray(LABELS), proxies)
    near(found, expected)
    assert jax.tree.leaves(after) == []


@pytest.mark.parametrize("name", [name for name in LOSSES if not LOSSES[name].uses_proxies])
def test_pair_losses_train_the_class_head_separately(name):
    blocks, proxies = blocks_and_proxies()

    @jax.jit
    def gradients(blocks, proxies):
        states = dict.fromkeys(blocks, base.State())

        def total(b, p):
            return metric.metric_loss(CHOSEN[name], states, b, jnp.asarray(LABELS), p)[0]

        return jax.grad(total, argnums=(0, 1))(blocks, proxies)

    for_rows, for_proxies = gradients(blocks, proxies)
    elsewhere, _ = gradients(blocks, jax.tree.map(jnp.negative, proxies))
    for each in blocks:
        near(for_rows[each], elsewhere[each], 1e-7)  # independent of the proxies
        assert np.abs(for_rows[each]).max() > 0
        assert np.abs(for_proxies[each]).max() > 0


PUBLISHED = {
    "norm_softmax": {"temperature": 0.05},
    "arcface": {"scale": 64.0, "margin": 0.5},
    "proxy_anchor": {"scale": 32.0, "margin": 0.1},
    "multi_similarity": {"alpha": 2.0, "beta": 50.0, "threshold": 0.5, "margin": 0.1},
    "triplet": {"margin": 0.1},
    "contrastive": {"margin": 0.5},
    "supcon": {"temperature": 0.1},
}


def test_every_loss_has_its_published_settings():
    own = {
        name: {k: v for k, v in dataclasses.asdict(loss()).items() if k not in SHARED}
        for name, loss in LOSSES.items()
    }
    assert own == PUBLISHED


SHARED = {field.name for field in dataclasses.fields(base.Loss)}


def test_named_loss_keeps_the_block_weights():
    before = NormSoftmax(local_weight=0.25, fused_weight=0.0, temperature=0.3)
    assert named("norm_softmax", before) is before
    assert named("arcface", before) == LOSSES["arcface"](local_weight=0.25, fused_weight=0.0)


def test_posterior_temperature_is_that_of_the_class_head_loss():
    found = {name: loss.posterior_temperature for name, loss in CHOSEN.items()}
    assert found == {
        "norm_softmax": 0.2, "arcface": 1 / 8, "proxy_anchor": 1 / 8, "multi_similarity": 0.05,
        "triplet": 0.05, "contrastive": 0.05, "supcon": 0.05,
    }  # fmt: skip


def test_unknown_loss_is_an_error():
    with pytest.raises(UserError) as caught:
        named("tripplet", CHOSEN["triplet"])
    assert str(caught.value) == (
        "loss.name='tripplet' is unknown; did you mean 'triplet'? (allowed: arcface, contrastive, "
        "multi_similarity, norm_softmax, proxy_anchor, supcon, triplet)"
    )


# ---- adversarial losses --------------------------------------------------------------------------


def test_adversarial_losses_at_equilibrium_and_elsewhere():
    zero = jnp.zeros(5)
    even = jnp.full(5, 1 / 5)
    near(adversarial.discriminator_loss(zero, zero, even), 2 * np.log(2), 1e-6)
    near(adversarial.generator_loss(zero), np.log(2), 1e-6)
    real, fake = jnp.array([1.0, -2.0, 300.0]), jnp.array([0.5, -300.0, 3.0])
    expected = np.mean(np.log1p(np.exp(-np.asarray(real, np.float64)))) + np.mean(
        np.log1p(np.exp(np.asarray(fake, np.float64)))
    )
    third = jnp.full(3, 1 / 3)
    near(adversarial.discriminator_loss(real, fake, third), expected)
    one = adversarial.discriminator_loss(real, fake, jnp.array([0.0, 0.0, 1.0]))
    near(one, adversarial.discriminator_loss(real, fake[2:], jnp.ones(1)))
    # The gradients of G and D with respect to D(x^) have opposite signs.
    assert (jax.grad(adversarial.generator_loss)(fake) < 0).any()
    assert (jax.grad(lambda f: adversarial.discriminator_loss(real, f, third))(fake) >= 0).all()


def test_r1_of_a_linear_and_of_a_quadratic_discriminator():
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.uniform(size=(4, 5, 6, 3)), jnp.float32)
    w = jnp.asarray(draw.normal(size=(5, 6, 3)), jnp.float32)
    linear = adversarial.r1_penalty(lambda x: jnp.einsum("bhwc,hwc->b", x, w) + 7, x)
    near(linear, 0.5 * np.sum(np.square(w)))
    quadratic = adversarial.r1_penalty(lambda x: 1.5 * jnp.sum(jnp.square(x), (1, 2, 3)), x)
    near(quadratic, 0.5 * 9 * np.sum(np.square(x)) / 4)


def test_psnr():
    clean = jnp.full((3, 4, 4, 3), 0.5)
    error = jnp.array([0.0, 0.1, 0.01])[:, None, None, None]
    expected = [60, 10 * np.log10(1 / (0.01 + 1e-6)), 39.957]
    near(adversarial.psnr(clean + error, clean), expected, 1e-3)
    # Not clipped: a normalised mid map has no range.
    near(adversarial.psnr(jnp.full((1, 2, 2, 3), 2.0), jnp.ones((1, 2, 2, 3))), [0], 1e-3)


def test_reconstruction_is_the_mean_root_of_each_images_error():
    target = jnp.full((3, 2, 2, 3), 0.5)
    found = target + jnp.asarray([0.0, 0.1, 0.3])[:, None, None, None]
    expected = np.mean(np.sqrt(np.array([0.0, 0.01, 0.09]) + 1e-4))
    near(adversarial.reconstruction(found, target), expected, 1e-5)
    # An exact image has a gradient of zero, not of NaN.
    gradient = jax.grad(adversarial.reconstruction)(found, target)
    assert np.isfinite(gradient).all() and (gradient[0] == 0).all()


def test_code_divergence():
    zero = jnp.zeros((2, 3))
    near(adversarial.code_divergence(zero, zero), 0.0)
    near(adversarial.code_divergence(zero + 2.0, zero), 0.5 * 3 * 4, 1e-5)
    near(adversarial.code_divergence(zero, zero + 1.0), 0.5 * 3 * (np.e - 2), 1e-5)
