"""Second views of an image, beside their definitions and OpenCV."""

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

from afa.data.augment import LUMA
from afa.models import views
from afa.models.views import VIEWS

SHAPES = [(64, 64), (40, 56), (33, 47)]


def smooth(shape, seed=0):
    """An image with light and dark regions, in [0, 1]."""
    noise = np.random.default_rng(seed).standard_normal((*shape, 3), np.float32)
    image = cv2.GaussianBlur(noise, (0, 0), 4)
    return (image - image.min()) / np.ptp(image)


@pytest.mark.parametrize("name", sorted(VIEWS))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_is_an_image(name, shape):
    """Of the same shape, in [0, 1], each image on its own; a constant image stays constant."""
    images = np.stack([smooth(shape, seed) for seed in range(3)])
    found = np.asarray(VIEWS[name](jnp.asarray(images)))
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 1
    np.testing.assert_allclose(VIEWS[name](jnp.asarray(images[1:2])), found[1:2], atol=1e-6)
    assert np.abs(found - images).max() > 0.01
    plain = np.asarray(VIEWS[name](jnp.full((1, *shape, 3), 0.3)))
    assert np.ptp(plain) < 1e-5


def opencv_clahe(image):
    """The same with OpenCV, which has 256 bins; sides must divide by the number of tiles,
    and in a tile of few pixels it spreads what is cut off unevenly."""
    grey = image @ LUMA
    tool = cv2.createCLAHE(clipLimit=views.CLIP, tileGridSize=(views.TILES, views.TILES))
    found = tool.apply(np.rint(255 * grey).astype(np.uint8))
    return grey, found.astype(np.float32) / 255


@pytest.mark.parametrize("shape", [(160, 240), (320, 256)])
def test_clahe_is_that_of_opencv(shape):
    # Low contrast, so that the equalisation has much to do, and fine bins matter less.
    for seed in range(3):
        image = 0.3 + 0.4 * smooth(shape, seed)
        grey, expected = opencv_clahe(image)
        found = np.asarray(views.clahe(jnp.asarray(image[None])))[0]
        change = (found - image).mean(-1)
        difference = np.abs(grey + change - expected)
        assert difference.mean() < 0.02, seed
        assert np.abs(expected - grey).mean() > 3 * difference.mean()
        # Colours keep their differences where nothing is cut off.
        inside = ((found > 0) & (found < 1)).all(-1)
        np.testing.assert_allclose((found - image)[inside].std(-1), 0, atol=1e-5)


def test_clahe_limits_the_contrast():
    """A faint pattern grows by at most the limit, not to the whole range."""
    image = np.full((1, 64, 64, 3), 0.5, np.float32)
    image[:, ::2] += 0.05
    found = np.asarray(views.clahe(jnp.asarray(image)))
    assert np.ptp(image) < np.ptp(found) < 3 * np.ptp(image)


def test_zoom_shows_the_centre():
    image = np.zeros((1, 64, 64, 3), np.float32)
    image[:, 16:48, 16:48] = 1  # a quarter of the area becomes a half
    found = np.asarray(views.zoom(jnp.asarray(image)))
    assert found.mean() == pytest.approx(0.5, abs=0.03)
    assert found[0, 32, 32, 0] == pytest.approx(1) and found[0, 2, 2, 0] == pytest.approx(0)
    np.testing.assert_allclose(found, found[:, ::-1, ::-1], atol=1e-5)
