"""Image corruptions, each at severity 1 to 5.

A corruption is a pure function of (image, severity, random generator). Strengths are given for a
shorter side of 64 pixels and scale with the image size, so that a severity is about equally hard at
64 and at 224 pixels. Published benchmarks scale noise likewise: at the highest severity, the
standard deviation of Gaussian noise is 0.38 in ImageNet-C (Hendrycks and Dietterich 2019, 224
pixels) and 0.10 in Tiny ImageNet-C (64 pixels). Here it is 0.38 at 224 and 0.18 at 64 pixels.
"""

import functools
import math
from collections.abc import Callable, Mapping
from statistics import NormalDist

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from afa.data.images import decode as decode_image
from afa.data.images import encode_jpeg, resize
from afa.errors import UserError, choose

Pixels = UInt8[np.ndarray, "h w 3"]
Corruption = Callable[[Pixels, int, np.random.Generator], Pixels]

SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_SIDE = 64  # shorter side, in pixels, for which the strengths below are given

# One strength per severity.
NOISE_SIGMA = (9.0, 14.0, 22.0, 32.0, 46.0)  # grey levels
NOISE_GROWTH = 0.6  # exponent of the side: 0 is equal noise per pixel, 1 equal after downscaling
BLUR_SIGMA = (0.6, 1.0, 1.5, 2.1, 3.0)  # pixels
OCCLUDED_SHARE = (0.08, 0.16, 0.25, 0.35, 0.45)  # of the area
LOW_SIDE = (40, 28, 20, 15, 11)  # shorter side after downscaling, for any image size
IMPULSE_SHARE = (0.015, 0.03, 0.06, 0.11, 0.19)  # of the pixels
IMPULSE_GROWTH = 0.5  # exponent of the side
MOTION_LENGTH = (3.0, 5.0, 8.0, 11.0, 15.0)  # pixels
CLUTTER_PIECES = (4, 8, 13, 20, 28)
CONTRAST_KEPT = (0.6, 0.45, 0.33, 0.22, 0.14)  # of the deviation from the mean grey
JPEG_QUALITY = (30.0, 20.0, 14.0, 9.5, 6.5)
JPEG_GROWTH = 0.7  # blocks are 8 pixels at any image size: larger images need a lower quality
JPEG_WORST = 2
STRIPE_OPACITY = (0.25, 0.4, 0.55, 0.75, 0.95)

BYTE = 256
NORMAL_STEPS = 65536  # entries of the table of normal quantiles, indexed by 16 random bits
WIDEST_BLUR = 3.0  # largest sigma, in pixels, that is applied at full resolution


def corrupt(
    image: Pixels,
    name: str,
    severity: int,
    rng: np.random.Generator,
    table: Mapping[str, Corruption] | None = None,
) -> Pixels:
    """Applies the corruption `name` of a table; None for `CORRUPTIONS`.

    Raises:
      UserError: unknown corruption, or severity outside 1..5.
    """
    function = choose("corruption", name, CORRUPTIONS if table is None else table)
    if severity not in SEVERITIES:
        raise UserError(f"severity={severity!r} of corruption {name!r} must lie between 1 and 5")
    return function(image, severity, rng)


def held_back(trained: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the corruptions that are not trained on, in the order of `CORRUPTIONS`."""
    return tuple(name for name in CORRUPTIONS if name not in trained)


def side_scale(image: Pixels) -> float:
    """Returns the shorter side relative to `REFERENCE_SIDE`."""
    return min(image.shape[:2]) / REFERENCE_SIDE


def gaussian_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Adds independent Gaussian noise to every channel of every pixel."""
    sigma = NOISE_SIGMA[severity - 1] * side_scale(image) ** NOISE_GROWTH
    uniform = rng.integers(0, NORMAL_STEPS, image.shape, dtype=np.uint16)
    noise = _normal_quantiles().take(uniform)  # four times as fast as rng.normal
    noise *= np.float32(sigma)
    return cv2.add(image, noise, dtype=cv2.CV_8U)


@functools.cache
def _normal_quantiles() -> Float32[np.ndarray, "steps"]:
    inverse = NormalDist().inv_cdf
    return np.array([inverse((i + 0.5) / NORMAL_STEPS) for i in range(NORMAL_STEPS)], np.float32)


def gaussian_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Blurs with a Gaussian kernel."""
    sigma = BLUR_SIGMA[severity - 1] * side_scale(image)
    height, width = image.shape[:2]
    factor = 2 ** max(0, math.ceil(math.log2(sigma / WIDEST_BLUR)))
    if factor > 1:  # a wide blur removes the detail that downscaling loses
        image = resize(image, max(1, height // factor), max(1, width // factor))
        # Downscaling and upscaling blur too: subtract their variance.
        sigma = math.sqrt(sigma**2 - (factor**2 - 1) / 4) / factor
    blurred = cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    return resize(blurred, height, width)


def occlusion(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Covers part of the image with an opaque, randomly rotated rectangle or ellipse."""
    height, width = image.shape[:2]
    out = image.copy()
    area = OCCLUDED_SHARE[severity - 1] * height * width
    # The centre lies inside the image; a large occluder may extend beyond the border.
    x, y = rng.uniform(0.25, 0.75, 2) * (width, height)
    stretch = rng.uniform(0.7, 1.4)
    a, b = np.sqrt(area) * stretch, np.sqrt(area) / stretch
    colour = rng.integers(0, BYTE, 3).tolist()
    box = ((x, y), (a, b), rng.uniform(0, 180))
    if rng.random() < 0.5:
        cv2.fillConvexPoly(out, np.rint(cv2.boxPoints(box)).astype(np.int32), colour)
    else:
        to_ellipse = np.sqrt(4 / np.pi)  # gives the ellipse the area of the rectangle
        cv2.ellipse(out, (box[0], (a * to_ellipse, b * to_ellipse), box[2]), colour, cv2.FILLED)
    return out


def low_resolution(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Downscales the image and upscales it again."""
    height, width = image.shape[:2]
    factor = min(1.0, LOW_SIDE[severity - 1] / min(height, width))
    small = resize(image, max(1, round(height * factor)), max(1, round(width * factor)))
    return resize(small, height, width)


def salt_pepper(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Sets random pixels to white or black (impulse noise)."""
    out = image.copy()
    pixels = out.reshape(-1, 3)
    share = min(0.5, IMPULSE_SHARE[severity - 1] * side_scale(image) ** IMPULSE_GROWTH)
    hit = rng.integers(0, len(pixels), round(share * len(pixels)))
    pixels[hit[::2]] = BYTE - 1
    pixels[hit[1::2]] = 0
    return out


def motion_blur(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Blurs along a straight line at a random angle."""
    length = MOTION_LENGTH[severity - 1] * side_scale(image)
    angle = rng.uniform(0, np.pi)
    along = np.array((np.sin(angle), np.cos(angle)))  # (down, across)
    # Averaging with copies shifted by 1/2, 1/4, 1/8, ... of the path gives the mean over the path
    # in a logarithmic number of passes.
    halvings = range(1, max(1, math.ceil(math.log2(length))) + 1)
    shifts = [np.rint(along * length / 2**level).astype(int) for level in halvings]
    height, width = image.shape[:2]
    down, across = np.sum(np.abs(shifts), axis=0).tolist()
    before = (down // 2, across // 2)
    out = cv2.copyMakeBorder(
        image, before[0], down - before[0], before[1], across - before[1], cv2.BORDER_REFLECT
    )
    for dy, dx in shifts:
        h, w = out.shape[0] - abs(dy), out.shape[1] - abs(dx)
        left, right = max(0, -dx), max(0, dx)
        out = cv2.addWeighted(out[:h, left : left + w], 0.5, out[dy:, right : right + w], 0.5, 0)
    return out.reshape(height, width, 3)


def clutter(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Covers the image with small patches of itself, bars, ellipses and triangles."""
    out = image.copy()
    height, width = image.shape[:2]
    side = min(height, width)
    for _ in range(CLUTTER_PIECES[severity - 1]):
        x, y, from_x, from_y, size, turn, kind = rng.random(7)
        radius = max(1, round(side * (0.045 + 0.075 * size)))
        centre = (round(x * (width - 1)), round(y * (height - 1)))
        colour = rng.integers(0, BYTE, 3).tolist()
        if kind < 0.4:
            _paste_patch(out, image, centre, (from_x, from_y), radius)
        elif kind < 0.6:
            arm = 3 * radius * np.array((np.cos(np.pi * turn), np.sin(np.pi * turn)))
            ends = [np.rint(np.array(centre) + sign * arm).astype(int).tolist() for sign in (-1, 1)]
            cv2.line(out, ends[0], ends[1], colour, max(1, radius // 3), cv2.LINE_AA)
        elif kind < 0.8:
            axes = (radius, max(1, radius // 2))
            cv2.ellipse(out, centre, axes, 180 * turn, 0, 360, colour, cv2.FILLED, cv2.LINE_AA)
        else:
            corners = np.rint(np.array(centre) + radius * rng.uniform(-1.6, 1.6, (3, 2)))
            cv2.fillConvexPoly(out, corners.astype(np.int32), colour, cv2.LINE_AA)
    return out


def _paste_patch(
    out: Pixels, image: Pixels, centre: tuple[int, int], origin: tuple[float, float], radius: int
) -> None:
    """Copies a square of `image` to `centre` in `out`, clipped at the border."""
    height, width = image.shape[:2]
    left, top = max(0, centre[0] - radius), max(0, centre[1] - radius)
    right, bottom = min(width, centre[0] + radius), min(height, centre[1] + radius)
    x = int(origin[0] * (width - (right - left)))
    y = int(origin[1] * (height - (bottom - top)))
    out[top:bottom, left:right] = image[y : y + bottom - top, x : x + right - left]


def contrast(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Lowers the contrast: scales the deviation of every pixel from the mean grey level."""
    kept = CONTRAST_KEPT[severity - 1]
    mean = np.mean(cv2.mean(image)[:3])
    levels = np.arange(BYTE)
    return cv2.LUT(image, np.rint(mean + kept * (levels - mean)).astype(np.uint8))


def jpeg(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Compresses with JPEG at low quality."""
    quality = round(JPEG_QUALITY[severity - 1] / side_scale(image) ** JPEG_GROWTH)
    return decode_image(encode_jpeg(image, max(JPEG_WORST, min(100, quality))))


def stripes(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Overlays parallel bars of one colour, such as those of a blind or a fence."""
    height, width = image.shape[:2]
    period = min(height, width) * rng.uniform(0.1, 0.2)
    covered = rng.uniform(0.35, 0.5)
    angle, phase = rng.uniform(0, np.pi), rng.random()
    colour = rng.integers(0, BYTE, 3).astype(np.uint8)
    across = np.float32(np.cos(angle) / period) * np.arange(width, dtype=np.float32)
    down = np.float32(np.sin(angle) / period) * np.arange(height, dtype=np.float32)
    position = across[None, :] + (down[:, None] + np.float32(phase))  # in periods
    mask = ((position - np.floor(position)) < covered).astype(np.uint8)
    opacity = STRIPE_OPACITY[severity - 1]
    overlaid = cv2.addWeighted(image, 1 - opacity, np.broadcast_to(colour, image.shape), opacity, 0)
    return cv2.copyTo(overlaid, mask, image.copy())


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "gaussian_blur": gaussian_blur,
    "occlusion": occlusion,
    "low_resolution": low_resolution,
    "salt_pepper": salt_pepper,
    "motion_blur": motion_blur,
    "clutter": clutter,
    "contrast": contrast,
    "jpeg": jpeg,
    "stripes": stripes,
}
# Those that hide part of the image and leave the other pixels as they are.
LOCAL = ("occlusion", "salt_pepper", "clutter", "stripes")
CHANGED = 8  # grey levels: a smaller change of a pixel hides nothing


def changed(before: Pixels, after: Pixels) -> Bool[np.ndarray, "h w"]:
    """Pixels of which some channel differs by more than `CHANGED`."""
    return cv2.absdiff(before, after).max(axis=-1) > CHANGED
