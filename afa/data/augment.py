"""The label-preserving changes of training: crop, mirror, colour."""

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from afa.data.images import resize

ASPECT = 4 / 3  # most a crop is stretched, either way
LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # BT.601


def augment(
    image: UInt8[np.ndarray, "h w 3"],
    size: int,
    rng: np.random.Generator,
    crop_scale: float,
    flip: bool,
    jitter: float,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A random view of an image.

    Args:
      size: side of the result, in pixels.
      crop_scale: smallest share of the area that a crop keeps (Szegedy et al. 2015).
      flip: mirror half of the views.
      jitter: largest relative change of brightness, contrast and saturation, each drawn alone.
    """
    area, aspect, down, across, mirror, *colour = rng.random(8)
    top, left, height, width = crop_box(image.shape, area, aspect, down, across, crop_scale)
    view = resize(image[top : top + height, left : left + width], size, size)
    if flip and mirror < 0.5:
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
    """(top, left, height, width) of a crop inside `shape`, from four numbers in [0, 1)."""
    height, width = shape[:2]
    wanted = height * width * (crop_scale + (1 - crop_scale) * area)
    stretch = ASPECT ** (aspect - 0.5)  # square root of a ratio between 1/ASPECT and ASPECT
    high = max(1, min(height, round(np.sqrt(wanted) / stretch)))
    wide = max(1, min(width, round(np.sqrt(wanted) * stretch)))
    return int(down * (height - high + 1)), int(across * (width - wide + 1)), high, wide


def colour_matrix(
    brightness: float, contrast: float, saturation: float, mean: float
) -> Float32[np.ndarray, "3 4"]:
    """Affine map of RGB that changes brightness, contrast around `mean` and saturation at once."""
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = (1 - saturation) * LUMA + saturation * np.eye(3, dtype=np.float32)
    matrix[:, :3] *= brightness * contrast
    matrix[:, 3] = brightness * (1 - contrast) * mean
    return matrix
