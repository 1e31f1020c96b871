"""Fills: random regions of an image hidden, or filled from their surroundings."""

import cv2
import numpy as np
from jaxtyping import Bool, UInt8

from afa.data.families.overlays import overlays, regions

FILLED = 0.5  # fraction of the images whose regions are filled; the others have overlays
WIDER = 4.0  # ratio of the two smoothings of a fill
LITTLE = 0.05  # weight of the wider one


def fills(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """`overlays`, or for half of the images the same regions filled from their surroundings, as a
    generator that inpaints leaves them. So F learns to describe an image of which parts are
    hidden, and one of which parts are drawn anew."""
    if rng.random() >= FILLED:
        return overlays(image, rng)
    height, width = image.shape[:2]
    hidden, grain = regions(height, width, rng)
    return np.where(hidden[..., None], surroundings(image, hidden, grain), image)


def surroundings(
    image: UInt8[np.ndarray, "h w 3"], hidden: Bool[np.ndarray, "h w"], grain: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Means of the pixels that are not hidden, weighted by a Gaussian of the deviation `grain`, and
    by one that is `WIDER` where there are few."""
    known = (~hidden).astype(np.float32)
    total, count = image * known[..., None], known
    estimate = np.full(image.shape, 127.5, np.float32)
    for sigma in (WIDER * grain, grain):
        near, weight = (cv2.GaussianBlur(each, (0, 0), sigma) for each in (total, count))
        weight = weight[..., None]
        estimate = (near + LITTLE * estimate) / (weight + LITTLE)
    return np.rint(np.clip(estimate, 0, 255)).astype(np.uint8)
