"""Overlays: random regions of an image hidden by a colour or a texture."""

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

PUBLISHED_SIDE = 64  # lengths below are in pixels of an image of this shorter side
GRAIN = (1.0, 10.0)  # smoothing of the noise whose peaks are hidden: the size of the regions
STRETCH = 3.0  # largest ratio of their length to their width
SHARE = (0.03, 0.5)  # hidden fraction of the image
TEXTURE = (0.3, 2.0)  # smoothing of a texture, relative to that of the regions
DEVIATION = (5.0, 90.0)  # of a texture, in grey levels
OPAQUE = 0.6  # fraction of the images whose overlay is opaque
OPACITY = (0.4, 1.0)  # of the others


def overlays(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Hides regions of random size, direction and number under one colour, or under a texture of
    smoothed coloured noise; opaque or half transparent.

    The regions are the highest values of smoothed noise, so they have no shape in common with
    the bars, lattices, polygons and copied patches of the corruptions that are held back.
    """
    height, width = image.shape[:2]
    scale = min(height, width) / PUBLISHED_SIDE
    grain = scale * GRAIN[0] * (GRAIN[1] / GRAIN[0]) ** rng.random()
    field = _field(height, width, grain, STRETCH ** rng.random(), rng.uniform(0, 180), rng)
    hidden = field >= np.quantile(field, 1 - rng.uniform(*SHARE))
    colour = rng.uniform(0, 255, 3).astype(np.float32)
    cover = np.broadcast_to(colour, image.shape)
    if rng.random() < 0.5:
        cover = colour + _texture(height, width, grain * rng.uniform(*TEXTURE), rng)
    opacity = np.float32(1.0 if rng.random() < OPAQUE else rng.uniform(*OPACITY))
    mixed = opacity * np.clip(cover, 0, 255) + (1 - opacity) * image
    return np.rint(np.where(hidden[..., None], mixed, image)).astype(np.uint8)


def _field(
    height: int, width: int, grain: float, stretch: float, angle: float, rng: np.random.Generator
) -> Float32[np.ndarray, "h w"]:
    """White noise smoothed `stretch` times as far along one direction as across it."""
    side = int(np.ceil(1.5 * max(height, width)))  # holds the image in any direction
    noise = rng.standard_normal((side, side), np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), sigmaX=grain * stretch, sigmaY=grain)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), angle, 1.0)
    turn[:, 2] -= (side - width) / 2, (side - height) / 2
    return cv2.warpAffine(noise, turn, (width, height), borderMode=cv2.BORDER_REFLECT)


def _texture(
    height: int, width: int, grain: float, rng: np.random.Generator
) -> Float32[np.ndarray, "h w 3"]:
    """Smoothed coloured noise of random deviation."""
    noise = rng.standard_normal((height, width, 3), np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), grain)
    return noise * np.float32(rng.uniform(*DEVIATION) / (noise.std() + 1e-6))
