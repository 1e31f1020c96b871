"""Overlays: random regions of an image hidden by a colour or a texture."""

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

PUBLISHED_SIDE = 64  # lengths below are in pixels of an image of this shorter side
LAYERS = 3  # most overlays of an image
GRAIN = (0.6, 10.0)  # smoothing of the noise whose peaks are hidden: the size of the regions
STRETCH = 3.0  # largest ratio of their length to their width
SHARE = (0.03, 0.5)  # hidden fraction of the image
CONTOURS = 0.5  # fraction of the overlays whose regions are bands around a contour line
COLOURS = 4  # of a patchwork; OpenCV smooths four channels at once
DETAIL = (0.3, 2.0)  # smoothing of patchwork and texture, relative to that of the regions
DEVIATION = (5.0, 90.0)  # of a texture, in grey levels
OPAQUE = 0.6  # fraction of the overlays that are opaque
OPACITY = (0.4, 1.0)  # of the others
SOFT = 0.5  # fraction of the overlays with soft edges
EDGE = (0.3, 1.0)  # their smoothing

Cover = Float32[np.ndarray, "h w 3"]  # grey levels


def overlays(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Hides regions of random size, direction and number, opaque or half transparent, with hard or
    soft edges, under one colour, a patchwork of colours, or a texture of smoothed coloured noise;
    one to three times over one another.

    The regions are the highest values of smoothed noise, or the bands around one of its contour
    lines, so they have no shape in common with the bars, lattices, polygons, copied patches and
    single pixels of the corruptions that are held back.
    """
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(1, LAYERS + 1))):
        opacity, cover = layer(height, width, rng)
        mixed = opacity * cover + (1 - opacity) * image
        image = np.rint(mixed).astype(np.uint8)
    return image


def layer(
    height: int, width: int, rng: np.random.Generator
) -> tuple[Float32[np.ndarray, "h w 1"], Cover]:
    """Returns the opacity of an overlay, 0 at intact pixels, and what covers the others."""
    hidden, grain = regions(height, width, rng)
    cover = COVERS[int(rng.integers(len(COVERS)))](height, width, grain * rng.uniform(*DETAIL), rng)
    opacity = hidden * np.float32(1.0 if rng.random() < OPAQUE else rng.uniform(*OPACITY))
    if rng.random() < SOFT:
        edge = rng.uniform(*EDGE) * min(height, width) / PUBLISHED_SIDE
        # By rounding, a mean of ones can exceed 1.
        opacity = np.minimum(cv2.GaussianBlur(opacity, (0, 0), edge), 1)
    return opacity[..., None], np.clip(cover, 0, 255)


def regions(
    height: int, width: int, rng: np.random.Generator
) -> tuple[Bool[np.ndarray, "h w"], float]:
    """Returns the hidden pixels, and the smoothing of the noise behind them in pixels."""
    scale = min(height, width) / PUBLISHED_SIDE
    grain = scale * GRAIN[0] * (GRAIN[1] / GRAIN[0]) ** rng.random()
    field = _field(height, width, grain, STRETCH ** rng.random(), rng.uniform(0, 180), rng)
    if rng.random() < CONTOURS:
        field = -np.abs(field - np.quantile(field, rng.random()))
    return field >= np.quantile(field, 1 - rng.uniform(*SHARE)), grain


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


def _plain(height: int, width: int, grain: float, rng: np.random.Generator) -> Cover:
    """One colour."""
    return np.broadcast_to(rng.uniform(0, 255, 3).astype(np.float32), (height, width, 3))


def _patchwork(height: int, width: int, grain: float, rng: np.random.Generator) -> Cover:
    """A few colours; each where its own smoothed noise is the highest."""
    fields = rng.standard_normal((height, width, COLOURS), np.float32)
    nearest = cv2.GaussianBlur(fields, (0, 0), grain).argmax(axis=-1)
    return rng.uniform(0, 255, (COLOURS, 3)).astype(np.float32)[nearest]


def _texture(height: int, width: int, grain: float, rng: np.random.Generator) -> Cover:
    """A colour with smoothed coloured noise of random deviation."""
    noise = rng.standard_normal((height, width, 3), np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), grain)
    noise *= np.float32(rng.uniform(*DEVIATION) / (noise.std() + 1e-6))
    return _plain(height, width, grain, rng) + noise


COVERS = (_plain, _patchwork, _texture)
