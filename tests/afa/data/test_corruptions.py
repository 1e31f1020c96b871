"""Corruptions are pure, harder with severity, and about equally hard at any image size; so are the
unseen ones."""

from typing import Any

import cv2
import numpy as np
import pytest

from afa.config import TRAINED_CORRUPTIONS
from afa.data import corruptions
from afa.data.corruptions import CORRUPTIONS, SEVERITIES, held_back
from afa.data.unseen import UNSEEN
from afa.errors import UserError

EVERY = CORRUPTIONS | UNSEEN


def corrupt(image, name, severity, rng):
    return corruptions.corrupt(image, name, severity, rng, EVERY)


def scene(size):
    """An image with edges, colours and fine texture, the same one at any size."""
    base = np.random.default_rng(7).integers(30, 226, (96, 96, 3), dtype=np.uint8)
    base = cv2.GaussianBlur(base, (0, 0), 1.2)
    cv2.circle(base, (40, 45), 22, (220, 60, 40), cv2.FILLED)
    cv2.rectangle(base, (55, 20), (85, 80), (30, 90, 200), 4)
    kind = cv2.INTER_AREA if size < 96 else cv2.INTER_CUBIC
    return cv2.resize(base, (size, size), interpolation=kind)


def damage(size, name, severity, draws=6):
    """Mean squared error at the 64-pixel scale, over several draws."""
    clean = scene(size)
    errors = []
    for seed in range(draws):
        corrupted = corrupt(clean, name, severity, np.random.default_rng(seed))
        small = [cv2.resize(x, (64, 64), interpolation=cv2.INTER_AREA) for x in (clean, corrupted)]
        errors.append(np.square(np.subtract(*(x.astype(float) for x in small))).mean())
    return np.mean(errors)


@pytest.mark.parametrize("name", EVERY)
def test_is_a_pure_function(name):
    clean = scene(64)
    before = clean.copy()
    first, second = (corrupt(clean, name, 3, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(clean, before)
    assert first.dtype == np.uint8
    assert first.shape == clean.shape
    assert (first != clean).any()


@pytest.mark.parametrize("name", EVERY)
def test_uses_only_the_given_random_generator(name):
    first, second = (corrupt(scene(64), name, 4, np.random.default_rng(seed)) for seed in (1, 2))
    drawn = (first != second).any()
    assert drawn == (name not in {"gaussian_blur", "low_resolution", "contrast", "jpeg"})


@pytest.mark.parametrize("name", EVERY)
def test_grows_with_severity(name):
    damages = [damage(64, name, severity, draws=30) for severity in SEVERITIES]
    assert (np.diff(damages) > 0).all(), damages


@pytest.mark.parametrize("name", EVERY)
def test_is_about_equally_hard_on_a_large_image(name):
    ratio = damage(192, name, 3) / damage(64, name, 3)
    # Pixel noise averages out in a large image; NOISE_GROWTH compensates for most of it.
    assert 0.15 < ratio < 2


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 90, 3), (33, 17, 3)])
@pytest.mark.parametrize("severity", [1, 5])
def test_images_of_any_shape(name, shape, severity):
    image = np.full(shape, 90, np.uint8)
    assert corrupt(image, name, severity, np.random.default_rng(0)).shape == shape


def test_noise_has_the_given_standard_deviation():
    grey = np.full((64, 64, 3), 128, np.uint8)
    noise = corrupt(grey, "gaussian_noise", 2, np.random.default_rng(0)).astype(float) - 128
    assert abs(noise.mean()) < 1
    assert abs(noise.std() - 14) < 0.5


def test_wide_blur_at_lower_resolution_equals_the_direct_one():
    image = scene(224)
    for severity, sigma in ((2, 1.0), (3, 1.5), (5, 3.0)):
        plain = cv2.GaussianBlur(image, (0, 0), sigma * 224 / 64)
        fast = corrupt(image, "gaussian_blur", severity, np.random.default_rng(0))
        assert np.abs(fast.astype(int) - plain).mean() < 1


def test_motion_blur_keeps_lines_along_the_motion():
    class East(np.random.Generator):
        """Draws the angle 0: the camera moves along the rows."""

        def uniform(self, *args: Any, **kwargs: Any) -> Any:
            return 0.0

    image = np.zeros((64, 64, 3), np.uint8)
    image[30:32] = 255
    out = corrupt(image, "motion_blur", 5, East(np.random.PCG64(0)))
    np.testing.assert_array_equal(out, image)
    turned = np.ascontiguousarray(image.transpose(1, 0, 2))
    blurred = corrupt(turned, "motion_blur", 5, East(np.random.PCG64(0)))
    assert blurred.max() < 80
    assert abs(float(blurred.sum()) / turned.sum() - 1) < 0.1


def test_severity_and_name_are_checked():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"severity=6 of corruption 'jpeg' must lie between 1 and"):
        corrupt(scene(64), "jpeg", 6, rng)
    with pytest.raises(UserError, match=r"'gaussian_nose' is unknown; did you mean 'gaussian_noi"):
        corrupt(scene(64), "gaussian_nose", 1, rng)


def test_held_back_corruptions_are_those_not_trained():
    rest = held_back(TRAINED_CORRUPTIONS)
    assert set(rest) | set(TRAINED_CORRUPTIONS) == set(CORRUPTIONS)
    assert not set(rest) & set(TRAINED_CORRUPTIONS)
