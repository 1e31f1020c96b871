"""Unseen corruptions: never trained on, never used for a choice, read by one benchmark only.

Five corruptions of the kind of ImageNet-C-bar (Mintun, Kirillov & Xie 2021, "On interaction between
augmentations and corruptions in natural corruption robustness"), which chose corruptions that
differ from those of ImageNet-C and from augmentations. Written from their descriptions. Strengths
are our own: at severities 1, 3 and 5 the Recall@1 of published SqueezeNet features falls about as
far as under the corruptions of `afa.data.corruptions`. As there, strengths are given for a shorter
side of 64 pixels and scale with the image size.

Only `afa.evaluation.benchmarks.corrupted` applies them: `data.corruptions` refuses them, and the
evaluation of a run does not know them.
"""

from collections.abc import Iterable

import cv2
import numpy as np
from jaxtyping import Float32, Float64

from afa.data.corruptions import (
    BYTE,
    CORRUPTIONS,
    NOISE_GROWTH,
    Corruption,
    Pixels,
    side_scale,
)
from afa.errors import UserError

# One strength per severity.
BLUE_SIGMA = (7.0, 10.5, 16.0, 23.0, 33.0)  # grey levels
PLASMA_SIGMA = (16.0, 24.0, 35.0, 48.0, 64.0)  # grey levels
CUT_SHARE = (0.1, 0.18, 0.27, 0.37, 0.48)  # of the area; 0.5 is a full checkerboard
REFRACTION = (0.008, 0.012, 0.018, 0.026, 0.038)  # shift of a ray, of the shorter side
SPARKLES = (4, 7, 11, 16, 22)

BLUE_CUT = 1.0  # sigma, in pixels, of the low-pass that is subtracted
NARROWEST_CUT = 0.5  # in pixels of the image: a narrower low-pass would subtract all of the noise
PLASMA_ROUGHNESS = (1.1, 1.7)  # range of the exponent a of the amplitude 1 / f^a
GREY = 128
CELL = (0.1, 0.2)  # side of a cell of the checkerboard, of the shorter side
WAVE = 0.07  # sigma of the smoothing of the water surface, of the shorter side
LIGHT = (0.45, 1.9)  # darkest and brightest light
SPARKLE_RADIUS = (0.08, 0.2)  # decay length of a ray, of the shorter side
RAY_WIDTH = 0.09  # of the decay length
NARROWEST_RAY = 0.5  # in pixels
REACH = 3.0  # decay lengths after which a ray is cut off
FLAT = 1e-6  # deviation below which noise is constant


def blue_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Adds grey noise of high frequency: white noise minus its Gaussian low-pass."""
    scale = side_scale(image)
    white = rng.standard_normal(image.shape[:2], np.float32)
    cut = max(NARROWEST_CUT, BLUE_CUT * scale)
    noise = white - cv2.GaussianBlur(white, (0, 0), cut, borderType=cv2.BORDER_REFLECT)
    noise = _unit(noise) * np.float32(BLUE_SIGMA[severity - 1] * scale**NOISE_GROWTH)
    return _added(image, cv2.merge([noise] * 3))


def plasma_noise(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Adds coloured clouds: noise whose amplitude falls with the frequency f as 1 / f^a.

    a is drawn from `PLASMA_ROUGHNESS`; frequencies are counted per image, so that clouds are as
    large in any image.
    """
    height, width = image.shape[:2]
    roughness = rng.uniform(*PLASMA_ROUGHNESS)
    white = rng.standard_normal((3, height, width), np.float32)
    side = min(height, width)
    down = np.fft.fftfreq(height, 1 / side)[:, None]
    across = np.fft.rfftfreq(width, 1 / side)[None, :]
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf  # the mean stays
    spectrum = np.fft.rfft2(white) * frequency**-roughness
    clouds = np.fft.irfft2(spectrum, (height, width)).astype(np.float32)
    clouds = _unit(clouds) * np.float32(PLASMA_SIGMA[severity - 1])
    return _added(image, np.ascontiguousarray(clouds.transpose(1, 2, 0)))


def checkerboard_cutout(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Sets squares in every second cell of a randomly turned and shifted grid to grey.

    A higher severity enlarges the squares, up to almost the whole cell.
    """
    height, width = image.shape[:2]
    cell = min(height, width) * rng.uniform(*CELL)
    angle, *shift = rng.uniform(0, (np.pi / 2, 2, 2))
    half = np.sqrt(CUT_SHARE[severity - 1] / 2)  # of a cell; every second cell is cut
    y, x = np.mgrid[:height, :width].astype(np.float32) / np.float32(max(cell, 1.0))
    u = np.cos(angle) * x + np.sin(angle) * y + shift[0]
    v = np.cos(angle) * y - np.sin(angle) * x + shift[1]
    in_cell = np.maximum(np.abs(u - np.floor(u) - 0.5), np.abs(v - np.floor(v) - 0.5)) <= half
    second = (np.floor(u) + np.floor(v)) % 2 == 0
    out = image.copy()
    out[in_cell & second] = GREY
    return out


def caustic_refraction(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Shows the image through moving water: bent lines, and bright lines where light is focused.

    The water has a smooth random height h. A ray through x is bent to x + d grad h, so the pixel
    there is seen at x. Light is bent likewise, and its brightness is inverse to the area onto which
    a small square is mapped: 1 / |det(I + d H)| with the Hessian H of h, clipped to `LIGHT`.
    """
    height, width = image.shape[:2]
    # The surface is smooth: it is computed at low resolution, and is the same at any image size.
    shrink = max(1.0, side_scale(image))
    rows, columns = (max(2, round(side / shrink)) for side in (height, width))
    side = min(rows, columns)
    noise = rng.standard_normal((rows, columns), np.float32)
    h = cv2.GaussianBlur(noise, (0, 0), max(0.5, WAVE * side), borderType=cv2.BORDER_REFLECT)
    slope = np.stack(np.gradient(h))  # (down, across)
    length = np.sqrt(np.mean(np.square(slope)))
    slope *= REFRACTION[severity - 1] * side / max(float(length), 1e-12)
    (yy, yx), (xy, xx) = (np.gradient(each) for each in slope)
    area = np.abs((1 + yy) * (1 + xx) - yx * xy)
    light = 1 / np.clip(area, 1 / LIGHT[1], 1 / LIGHT[0])
    fields = np.stack([*(slope * (height / rows)), light], axis=-1).astype(np.float32)
    fields = cv2.resize(fields, (width, height), interpolation=cv2.INTER_LINEAR)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    seen = cv2.remap(
        image, x + fields[..., 1], y + fields[..., 0], cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )  # fmt: skip
    return _bytes(seen * fields[..., 2:])


def sparkles(image: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Adds star-shaped highlights of nearly white light: a bright centre and four or six rays."""
    side = min(image.shape[:2])
    light = np.zeros(image.shape, np.float32)
    for _ in range(SPARKLES[severity - 1]):
        place, radius, turn, lines = rng.random(2), rng.random(), rng.random(), rng.integers(2, 4)
        tint = rng.uniform(0.75, 1, 3).astype(np.float32)
        radius = side * (SPARKLE_RADIUS[0] + (SPARKLE_RADIUS[1] - SPARKLE_RADIUS[0]) * radius)
        _add_star(light, place * image.shape[:2], radius, np.pi * turn, int(lines), tint)
    return _bytes(image + (BYTE - 1) * light)


def _add_star(
    light: Float32[np.ndarray, "h w 3"],
    centre: Float64[np.ndarray, "2"],
    radius: float,
    turn: float,
    lines: int,
    tint: Float32[np.ndarray, "3"],
) -> None:
    """Adds a star: per line exp(-|u| / radius) across a Gaussian profile, and a round centre.

    u is the distance along the line. Near the edges of a thin line its profile is wider and
    fainter, so that a star gives as much light in a small image.
    """
    reach = REACH * radius
    top, left = np.maximum(np.floor(centre - reach), 0).astype(int).tolist()
    bottom, right = np.ceil(centre + reach).astype(int).tolist()
    window = light[top : bottom + 1, left : right + 1]
    y, x = np.mgrid[: window.shape[0], : window.shape[1]].astype(np.float32)
    y, x = y + np.float32(top - centre[0]), x + np.float32(left - centre[1])
    width = RAY_WIDTH * radius
    drawn = max(width, NARROWEST_RAY)
    star = np.exp(-(x * x + y * y) / (2 * (1.5 * drawn) ** 2)) * (width / drawn) ** 2
    for line in range(lines):
        angle = turn + np.pi * line / lines
        along = np.abs(np.cos(angle) * x + np.sin(angle) * y)
        across = np.cos(angle) * y - np.sin(angle) * x
        profile = np.exp(-along / radius - np.square(across) / (2 * drawn**2))
        star += profile * (width / drawn) * (along < reach)
    window += star.astype(np.float32)[..., None] * tint


def _unit(noise: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Scales noise to standard deviation 1; noise of a single pixel has none and becomes 0."""
    deviation = float(noise.std())
    return noise / np.float32(deviation) if deviation > FLAT else np.zeros_like(noise)


def _added(image: Pixels, noise: Float32[np.ndarray, "h w 3"]) -> Pixels:
    return cv2.add(image, noise, dtype=cv2.CV_8U)


def _bytes(values: Float32[np.ndarray, "h w 3"]) -> Pixels:
    return np.rint(np.clip(values, 0, BYTE - 1)).astype(np.uint8)


UNSEEN: dict[str, Corruption] = {
    "blue_noise": blue_noise,
    "plasma_noise": plasma_noise,
    "checkerboard_cutout": checkerboard_cutout,
    "caustic_refraction": caustic_refraction,
    "sparkles": sparkles,
}


def refuse_unseen(field: str, names: Iterable[str]) -> None:
    """Checks that no unseen corruption is among the names of a field that training or a choice
    reads.

    Raises:
      UserError: one is; the message says why it is refused.
    """
    for name in names:
        if name in UNSEEN:
            raise UserError(
                f"{field}={name!r} is an unseen corruption, which no training and no choice may "
                "use: only then does --benchmark=corrupted_queries measure how a descriptor does "
                f"on corruptions that nothing was fitted to (allowed: {', '.join(CORRUPTIONS)})"
            )
