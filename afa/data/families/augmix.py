"""AugMix: mixtures of chains of simple transforms."""

import cv2
import numpy as np
from jaxtyping import UInt8

from afa.data.families.mixing import MOST, Floats, mixed, warped

SEVERITY = 3 / 10  # published: 3 of 10 levels; strengths are uniform up to it
LEAST = 0.1 / 10  # smallest strength that is drawn


def augmix(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """AugMix (Hendrycks et al. 2020, algorithm 1) with its transforms of positions and tones:
    stretched contrast, equalised histogram, fewer grey levels, inverted bright pixels, rotation,
    shear and shift. Those that resemble corruptions (contrast, brightness, colour, sharpness) are
    left out, as in the paper. Its consistency loss is `train.consistency`."""
    out = mixed(image.astype(np.float32), TRANSFORMS, rng)
    return np.clip(np.rint(out), 0, MOST).astype(np.uint8)


def _strength(rng: np.random.Generator) -> float:
    """Fraction of the largest strength."""
    return rng.uniform(LEAST, SEVERITY)


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _table(image: Floats, levels: np.ndarray) -> Floats:
    """Maps grey levels by a table of 256 entries for each channel."""
    table = np.ascontiguousarray(levels.reshape(1, 256, -1), np.float32)
    if table.shape[2] == 1:
        table = np.repeat(table, 3, axis=2)
    return cv2.LUT(np.rint(image).astype(np.uint8), table)


def autocontrast(image: Floats, rng: np.random.Generator) -> Floats:
    """Stretches each channel to the whole range of grey levels."""
    low, high = image.min((0, 1)), image.max((0, 1))
    stretched = (image - low) * (np.float32(MOST) / np.maximum(high - low, 1))
    return np.where(high > low, stretched, image).astype(np.float32)


def equalise(image: Floats, rng: np.random.Generator) -> Floats:
    """Equalises the histogram of each channel."""
    grey = np.rint(image).astype(np.uint8)
    return np.dstack([cv2.equalizeHist(grey[..., c]) for c in range(3)]).astype(np.float32)


def posterise(image: Floats, rng: np.random.Generator) -> Floats:
    """Keeps the 4 to 2 highest bits, as the strength demands."""
    dropped = 8 - (4 - round(4 * _strength(rng)))
    levels = np.arange(256) >> dropped << dropped
    return _table(image, levels)


def solarise(image: Floats, rng: np.random.Generator) -> Floats:
    """Inverts the grey levels above a threshold."""
    threshold = 256 * (1 - _strength(rng))
    levels = np.arange(256)
    return _table(image, np.where(levels < threshold, levels, 255 - levels))


def rotate(image: Floats, rng: np.random.Generator) -> Floats:
    """Rotates by at most 30 degrees at full strength."""
    height, width = image.shape[:2]
    angle = 30 * _strength(rng) * _sign(rng)
    centre = (width - 1) / 2, (height - 1) / 2
    return warped(image, cv2.getRotationMatrix2D(centre, angle, 1.0))


def shear_x(image: Floats, rng: np.random.Generator) -> Floats:
    """Shears by at most 0.3 at full strength."""
    return warped(image, np.array([[1, 0.3 * _strength(rng) * _sign(rng), 0], [0, 1, 0]]))


def shear_y(image: Floats, rng: np.random.Generator) -> Floats:
    """Shears by at most 0.3 at full strength."""
    return warped(image, np.array([[1, 0, 0], [0.3 * _strength(rng) * _sign(rng), 1, 0]]))


def shift_x(image: Floats, rng: np.random.Generator) -> Floats:
    """Shifts by at most a third of the width at full strength."""
    return warped(
        image, np.array([[1, 0, image.shape[1] / 3 * _strength(rng) * _sign(rng)], [0, 1, 0]])
    )


def shift_y(image: Floats, rng: np.random.Generator) -> Floats:
    """Shifts by at most a third of the height at full strength."""
    return warped(
        image, np.array([[1, 0, 0], [0, 1, image.shape[0] / 3 * _strength(rng) * _sign(rng)]])
    )


TRANSFORMS = (
    autocontrast, equalise, posterise, solarise, rotate, shear_x, shear_y, shift_x, shift_y
)  # fmt: skip
