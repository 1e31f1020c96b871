"""Perturbations of the mid map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import near

from afa.losses.perturbations import PERTURBATIONS, Draws, scaled

SCALED = [name for name in PERTURBATIONS if name != "mixstyle"]


def rows_of(count):
    strength, direction = (jax.random.split(jax.random.key(i), count) for i in (2, 3))
    return Draws(strength, direction, lambda x: x)


@pytest.fixture(scope="module")
def case():
    """Mid map, gradient and rows of three images."""
    draw = np.random.default_rng(1)
    mid, g = (jnp.asarray(draw.normal(1, 1, (3, 2, 4, 5)), jnp.float32) for _ in range(2))
    return mid, g, rows_of(3)


def flat(x):
    return np.reshape(np.asarray(x, np.float64), (len(x), -1))


def strengths(rows):
    return np.array([jax.random.uniform(key) for key in rows.strength])


@pytest.mark.parametrize("name", SCALED)
def test_the_norm_is_relative_to_that_of_the_map(name, case):
    mid, g, rows = case
    u = strengths(rows)
    assert len(set(u.tolist())) == 3
    delta = PERTURBATIONS[name](mid, g, rows, 0.08)
    near(np.linalg.norm(flat(delta), axis=1), 0.08 * u * np.linalg.norm(flat(mid), axis=1))


def test_gradient_is_along_the_gradient_of_any_size(case):
    mid, g, rows = case
    delta = PERTURBATIONS["gradient"](mid, g, rows, 0.08)
    cosine = np.sum(flat(delta) * flat(g), 1) / (
        np.linalg.norm(flat(delta), axis=1) * np.linalg.norm(flat(g), axis=1)
    )
    near(cosine, np.ones(3))
    near(PERTURBATIONS["gradient"](mid, 1e-6 * g, rows, 0.08), delta, 1e-4)


def statistics_of(x):
    x = np.asarray(x, np.float64)
    return x.mean((1, 2)), x.std((1, 2))


def test_statistics_climb_along_mean_and_deviation(case):
    """The gradient with respect to the scale and the shift of each channel, by its definition."""
    mid, g, rows = case
    mean, deviation = statistics_of(mid)

    def value(a, b):
        moved = (
            (1 + a) * (mid - mean[:, None, None])
            + mean[:, None, None]
            + b * deviation[:, None, None]
        )
        return jnp.sum(g * moved)

    zero = jnp.zeros((3, 1, 1, 5))
    a, b = jax.grad(value, argnums=(0, 1))(zero, zero)
    expected = a * (mid - mean[:, None, None]) + b * deviation[:, None, None]
    found = PERTURBATIONS["statistics"](mid, g, rows, 0.08)
    near(found, scaled(mid, expected, rows, 0.08), 1e-4)
    assert (np.sum(flat(found) * flat(g), 1) > 0).all()


@pytest.mark.parametrize("name", ["statistics", "random_statistics", "mixstyle"])
def test_only_mean_and_deviation_change(name, case):
    mid, g, rows = case
    moved = mid + PERTURBATIONS[name](mid, g, rows, 0.3)
    before, after = (
        (np.asarray(x, np.float64) - m[:, None, None]) / s[:, None, None]
        for x in (mid, moved) for m, s in [statistics_of(x)]
    )  # fmt: skip
    near(after, before, 1e-3)


def test_controls_do_not_depend_on_the_gradient(case):
    mid, g, rows = case
    for name in ("random", "random_statistics", "mixstyle"):
        near(PERTURBATIONS[name](mid, g, rows, 0.1), PERTURBATIONS[name](mid, -g, rows, 0.1), 0)


def test_either_is_one_or_the_other():
    draw = np.random.default_rng(1)
    mid, g = (jnp.asarray(draw.normal(size=(40, 2, 2, 3)), jnp.float32) for _ in range(2))
    rows = rows_of(40)
    found, one, other = (
        flat(PERTURBATIONS[name](mid, g, rows, 0.1))
        for name in ("either", "gradient", "statistics")
    )
    is_one, is_other = ((found == each).all(1) for each in (one, other))
    assert (is_one ^ is_other).all() and 10 < is_one.sum() < 30


def test_mixstyle_takes_statistics_of_an_image_of_the_batch(case):
    """They lie between those of the image and those of another, both by the same weight."""
    mid, g, rows = case
    moved = statistics_of(mid + PERTURBATIONS["mixstyle"](mid, g, rows, 1.0))
    own = statistics_of(mid)
    for i in range(3):
        errors = []
        for j in range(3):
            steps = [(a[i] - b[i], b[j] - b[i]) for a, b in zip(moved, own, strict=True)]
            change, towards = (np.concatenate(each) for each in zip(*steps, strict=True))
            weight = change @ towards / max(towards @ towards, 1e-12)
            error = np.abs(change - weight * towards).max()
            errors.append(error if -1e-3 <= weight <= 1 + 1e-3 else np.inf)
        assert min(errors) < 1e-3


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_no_gradient_passes(name, case):
    mid, g, rows = case

    def through(mid, g):
        return jnp.sum(jnp.square(PERTURBATIONS[name](mid, g, rows, 0.5)))

    for each in jax.grad(through, argnums=(0, 1))(mid, g):
        assert (each == 0).all()


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_maps_and_gradients_of_zero(name, case):
    mid, g, rows = case
    for zero_mid, zero_g in ((mid, 0 * g), (0 * mid, g)):
        delta = np.asarray(PERTURBATIONS[name](zero_mid, zero_g, rows, 0.5))
        assert np.isfinite(delta).all()
        if name in ("gradient", "statistics"):
            assert np.abs(delta).max() < 1e-5
    half = PERTURBATIONS[name](mid.astype(jnp.bfloat16), g, rows, 0.5)
    assert half.dtype == jnp.bfloat16
