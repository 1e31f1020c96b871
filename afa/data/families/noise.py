"""Tuned noise: Gaussian or speckle noise of random strength."""

import numpy as np
from jaxtyping import UInt8

GAUSSIAN_SIGMA = 0.5  # published: largest deviation for ImageNet, in units of the range
SPECKLE_SIGMA = 0.6
GROWTH = 0.6  # exponent of the side, as for `afa.data.corruptions.gaussian_noise`
PUBLISHED_SIDE = 224


def noise(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Adds noise s n or, half of the time, s n x, with n ~ N(0, 1) for every value and
    s ~ U(0, sigma) (Rusak et al. 2020, sections 3.1 and 4.1, find random strength best). The
    strength is scaled to smaller images as that of the corruptions is."""
    size = (min(image.shape[:2]) / PUBLISHED_SIDE) ** GROWTH
    speckle = rng.random() < 0.5
    sigma = np.float32(rng.uniform(0, (SPECKLE_SIGMA if speckle else GAUSSIAN_SIGMA) * size))
    drawn = rng.standard_normal(image.shape, np.float32) * sigma
    x = image.astype(np.float32)
    x = x + x * drawn if speckle else x + 255 * drawn
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
