"""Losses of G and D, and PSNR."""

import jax
import jax.numpy as jnp
import numpy as np
from arrays import near

from afa.losses import adversarial


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


# Logits of two by two pixels: of probability 3/4, 1/4, 1/2, 3/4 that they are real.
PIXELS = jnp.asarray([[[np.log(3), -np.log(3)], [0, np.log(3)]]], jnp.float32)


def test_loss_of_pixels():
    # Intact with 3/4 and 1/2, damaged with 1/4 and 3/4, so that 3/4 and 1/4 are right.
    right = jnp.asarray([[[False, True], [False, True]]])
    expected = -np.log([3 / 4, 3 / 4, 1 / 2, 1 / 4]).mean()
    near(adversarial.pixel_loss(PIXELS, right), expected)
    near(adversarial.pixel_loss(-PIXELS, ~right), expected)
    near(adversarial.pixel_loss(jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4), bool)), np.log(2))
    far = jnp.asarray([[[300.0, -300.0]]])
    near(adversarial.pixel_loss(far, jnp.asarray([[[True, False]]])), 300)
    # It pulls the logits of damaged pixels down, and of the others up.
    slope = jax.grad(adversarial.pixel_loss)(PIXELS, right)
    np.testing.assert_array_equal(slope > 0, right)


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
