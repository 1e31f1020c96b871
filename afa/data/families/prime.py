"""PRIME: mixtures of random filters, deformations and colour maps."""

import math

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from afa.data.families.mixing import MOST, Floats, clipped, mixed

# Published settings for ImageNet.
FILTER_SIDE = 3
FILTER_SIGMA = 4.0  # largest deviation of the entries
COLOUR_CUT = 500  # highest frequency of a colour map
COLOUR_BAND = 20  # frequencies of one map
COLOUR_TEMPERATURE = 0.05  # largest variance of the coefficients
DEFORMATION_CUT = 500  # highest frequency of a deformation; here at most the side in pixels
BETA = 0.5  # both parameters of the Beta distributions of cut and strength


def prime(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """PRIME (Modas et al. 2022, sections 3 and 4): random filters, deformations and colour maps,
    mixed as in AugMix."""
    out = mixed(image.astype(np.float32), (filtered, deformed, recoloured), rng)
    return np.clip(np.rint(out), 0, MOST).astype(np.uint8)


def filtered(image: Floats, rng: np.random.Generator) -> Floats:
    """Convolves with the identity plus a kernel of N(0, s^2), s ~ U(0, `FILTER_SIGMA`)."""
    kernel = rng.uniform(0, FILTER_SIGMA) * rng.standard_normal((FILTER_SIDE, FILTER_SIDE))
    kernel[FILTER_SIDE // 2, FILTER_SIDE // 2] += 1
    return clipped(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_CONSTANT))


def recoloured(image: Floats, rng: np.random.Generator) -> Floats:
    """Maps each channel, in [0, 1], by v + sqrt(T) sum_n c_n sin(pi n v) over a band of frequencies
    n, with c_n ~ N(0, 1) and T ~ U(0, `COLOUR_TEMPERATURE`)."""
    cut = int(rng.integers(1, COLOUR_CUT + 1))
    first = int(rng.integers(1, cut + 1))
    n = np.arange(first, min(first + COLOUR_BAND, cut + 1))
    spread = math.sqrt(rng.uniform(0, COLOUR_TEMPERATURE))
    v = np.linspace(0, 1, 256)
    waves = rng.normal(0, spread, (3, len(n))) @ np.sin(np.pi * n[:, None] * v)
    levels = np.ascontiguousarray(MOST * np.clip(v + waves, 0, 1).T[None], np.float32)
    return cv2.LUT(clipped(np.rint(image)).astype(np.uint8), levels)


def deformed(image: Floats, rng: np.random.Generator) -> Floats:
    """Moves every pixel by a random sine series that is 0 at the border (Petrini et al. 2021).

    The variance T of the series lies between that of half a pixel and the largest without folds.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    most = rng.integers(3, min(DEFORMATION_CUT, side) + 1)
    cut = int(2 + rng.beta(BETA, BETA) * (most - 1))
    least = 1 / (math.pi * side**2 * math.log(cut))
    largest = max(least, 4 / (math.pi**3 * cut**2 * math.log(cut)))
    size = side * math.sqrt(least + rng.beta(BETA, BETA) * (largest - least))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    down, across = (np.float32(size) * _sines(height, width, cut, rng) for _ in range(2))
    position = np.clip(x - across, 0, width - 1), np.clip(y - down, 0, height - 1)
    return cv2.remap(image, *position, cv2.INTER_LINEAR)


def _sines(
    height: int, width: int, cut: int, rng: np.random.Generator
) -> Float32[np.ndarray, "h w"]:
    """sum_ij c_ij sin(pi i y) sin(pi j x) / |(i, j)| over |(i, j)| < cut + 1/2, c_ij ~ N(0, 1)."""
    n = np.arange(1, cut + 1, dtype=np.float32)
    radius = np.hypot(n[:, None], n)
    weights = rng.standard_normal((cut, cut), np.float32) * (radius < cut + 0.5) / radius
    down, across = (
        np.sin(np.pi * n[:, None] * np.linspace(0, 1, each, dtype=np.float32))
        for each in (height, width)
    )
    return (down.T @ weights @ across).astype(np.float32)
