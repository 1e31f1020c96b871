"""Training augmentation: random resized crop, horizontal flip, colour jitter."""

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from afa.data.images import resize

ASPECT = 4 / 3  # largest aspect ratio of a crop; the smallest is its inverse
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # BT.601


def augment(
    image: UInt8[np.ndarray, "h w 3"],
    size: int,
    rng: np.random.Generator,
    crop_scale: float,
    flip: bool,
    jitter: float,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Returns a randomly augmented view of an image.

    Args:
      size: side of the result, in pixels.
      crop_scale: smallest crop area, as a fraction of the image area (Szegedy et al. 2015).
      flip: flip horizontally with probability 1/2.
      jitter: largest relative change of brightness, contrast and saturation, drawn independently.
    """
    area, aspect, down, across, flip_draw, *colour = rng.random(8)
    top, left, height, width = crop_box(image.shape, area, aspect, down, across, crop_scale)
    view = resize(image[top : top + height, left : left + width], size, size)
    if flip and flip_draw < 0.5:
        view = cv2.flip(view, 1)
    if jitter:
        brightness, contrast, saturation = 1 + jitter * (2 * np.array(colour) - 1)
        mean = float(np.dot(cv2.mean(view)[:3], LUMA))
        view = cv2.transform(view, colour_matrix(brightness, contrast, saturation, mean))
    return view


def crop_box(
    shape: tuple[int, ...],
    area: float,
    aspect: float,
    down: float,
    across: float,
    crop_scale: float,
) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) of a crop inside `shape`, from four draws in [0, 1)."""
    height, width = shape[:2]
    crop_area = height * width * (crop_scale + (1 - crop_scale) * area)
    stretch = ASPECT ** (aspect - 0.5)  # square root of an aspect ratio in [1/ASPECT, ASPECT]
    crop_height = max(1, min(height, round(np.sqrt(crop_area) / stretch)))
    crop_width = max(1, min(width, round(np.sqrt(crop_area) * stretch)))
    top, left = int(down * (height - crop_height + 1)), int(across * (width - crop_width + 1))
    return top, left, crop_height, crop_width


def colour_matrix(
    brightness: float, contrast: float, saturation: float, mean: float
) -> Float32[np.ndarray, "3 4"]:
    """Affine RGB transform that changes brightness, contrast around `mean`, and saturation."""
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = (1 - saturation) * LUMA + saturation * np.eye(3, dtype=np.float32)
    matrix[:, :3] *= brightness * contrast
    matrix[:, 3] = brightness * (1 - contrast) * mean
    return matrix
