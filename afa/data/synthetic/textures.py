"""Solid textures: a three-dimensional pattern, fixed to the object, and a palette.

A pattern maps points to tones in [0, 2], which interpolate between the three palette colours.
Only exactly rounded operations and integer hashing are used, so that results are identical on
every machine.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from afa.data.synthetic.solids import Matrix, Vector, product, turn

T = TypeVar("T")
Points = Float32[np.ndarray, "3 n"]
Tones = Float32[np.ndarray, "n"]

# Ground, figure and accent colours, in sRGB. Few palettes, so that colour is a weak cue.
PALETTES: tuple[tuple[str, str, str], ...] = (
    ("f2e8cf", "386641", "bc4749"),
    ("fdf0d5", "003049", "c1121f"),
    ("ffd166", "26547c", "ef476f"),
    ("e9c46a", "264653", "e76f51"),
    ("8ecae6", "023047", "ffb703"),
    ("f4acb7", "6d3b52", "ffe5d9"),
    ("cad2c5", "354f52", "e07a5f"),
    ("f7ede2", "84512b", "e9a03b"),
    ("d8d4f2", "3d348b", "f18701"),
    ("2ec4b6", "0b3c49", "fdfffc"),
    ("ff9f1c", "5b2333", "f7f4f3"),
    ("b5e48c", "184e77", "f9f871"),
)
ACCENT, PATTERN, SWAPPED = range(3)  # roles of a part

_CORNER_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_CELL_RADIUS = 0.36  # radius of the largest spot, in lattice cells
_LINE = 0.2  # line width of a grid, in cells


class Draw:
    """Random draws from uniform numbers alone (PCG64), identical on every machine."""

    def __init__(self, *key: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._rng.random())

    def integer(self, low: int, high: int) -> int:
        """Returns a random integer in [low, high]."""
        return low + int(self._rng.random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, probability: float) -> bool:
        return float(self._rng.random()) < probability

    def field(self, *shape: int) -> Float32[np.ndarray, "*shape"]:
        """Returns uniform numbers in [0, 1)."""
        return self._rng.random(shape, dtype=np.float32)


class Texture(NamedTuple):
    """A pattern with its parameters, and three linear RGB colours.

    Attributes:
      pattern: a name in PATTERNS.
      palette: index into PALETTES.
      colours: ground, figure, accent; linear light.
      axes: rotation of the pattern relative to the object.
      period: period of the pattern in object units (an object is about 2 wide).
      duty: fraction of the figure colour.
      phase: offset of the pattern, in periods.
      salt: seed of the hash of noise and mosaics.
    """

    pattern: str
    palette: int
    colours: Matrix
    axes: Matrix
    period: float
    duty: float
    phase: Vector
    salt: int


def linear_colour(code: str) -> Vector:
    """Converts a hexadecimal colour to linear RGB, with the gamma of 2 that `render` applies."""
    red, green, blue = (int(code[i : i + 2], 16) / 255.0 for i in (0, 2, 4))
    return (red * red, green * green, blue * blue)


def draw_texture(draw: Draw, pattern: str | None = None, palette: int | None = None) -> Texture:
    """Draws a random texture, with the given pattern or palette if not None."""
    pattern = draw.pick(tuple(PATTERNS)) if pattern is None else pattern
    palette = draw.integer(0, len(PALETTES) - 1) if palette is None else palette
    ground, figure, accent = (linear_colour(code) for code in PALETTES[palette])
    if draw.chance(0.4):
        ground, figure = figure, ground
    tilt = product(turn(2, draw.uniform(-25.0, 25.0)), turn(0, draw.uniform(-25.0, 25.0)))
    low, high = PATTERNS[pattern].periods
    return Texture(
        pattern=pattern,
        palette=palette,
        colours=(ground, figure, accent),
        axes=product(tilt, turn(1, draw.uniform(-45.0, 45.0))),
        period=draw.uniform(low, high),
        duty=draw.uniform(0.35, 0.6),
        phase=(draw.uniform(0.0, 1.0), draw.uniform(0.0, 1.0), draw.uniform(0.0, 1.0)),
        salt=draw.integer(0, 2**31),
    )


def paint(texture: Texture, points: Points, role: int) -> Float32[np.ndarray, "3 n"]:
    """Returns linear RGB at points (in object coordinates) of a part with the given role."""
    ground, figure, accent = texture.colours
    if role == ACCENT:
        plain = np.array(accent, np.float32)[:, None]
        return np.broadcast_to(plain, points.shape)
    if role == SWAPPED:
        ground, figure, accent = figure, ground, accent
    scale = 1.0 / texture.period
    cell = [
        (r[0] * points[0] + r[1] * points[1] + r[2] * points[2]) * scale + shift
        for r, shift in zip(texture.axes, texture.phase, strict=True)
    ]
    tone = PATTERNS[texture.pattern].tone(np.stack(cell), texture)
    towards_figure = np.clip(tone, 0, 1)
    towards_accent = np.clip(tone - 1, 0, 1)
    channels = []
    for g, f, a in zip(ground, figure, accent, strict=True):
        mixed = g + (f - g) * towards_figure
        channels.append(mixed + (a - mixed) * towards_accent)
    return np.stack(channels)


# ---- noise ------------------------------------------------------------------------------------


def _hash(cells: Sequence[Int32[np.ndarray, "n"]], salt: int) -> UInt32[np.ndarray, "n"]:
    """Hashes integer lattice points (xor of multiples, then xor-shift-multiply)."""
    mixed = np.full(cells[0].shape, salt & 0xFFFFFFFF, np.uint32)
    for axis, prime in zip(cells, _CORNER_PRIMES, strict=True):
        mixed ^= axis.view(np.uint32) * np.uint32(prime)
        mixed ^= mixed >> np.uint32(15)
        mixed *= np.uint32(0x2C1B3C6D)
    mixed ^= mixed >> np.uint32(12)
    mixed *= np.uint32(0x297A2D39)
    mixed ^= mixed >> np.uint32(15)
    return mixed


def _uniform(cells: Sequence[Int32[np.ndarray, "n"]], salt: int) -> Tones:
    """Returns a pseudo-random number in [0, 1) for every lattice point."""
    return (_hash(cells, salt) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _split(p: Points) -> tuple[list[Int32[np.ndarray, "n"]], list[Tones]]:
    """Returns the lattice cell of each point, and its position in the cell, in [0, 1)."""
    floors = [np.floor(c) for c in p]
    inside = [c - f for c, f in zip(p, floors, strict=True)]
    return [f.astype(np.int32) for f in floors], inside


def value_noise(p: Points, salt: int) -> Tones:
    """Value noise in [0, 1]: random lattice values, interpolated with 3t² - 2t³."""
    cell, t = _split(p)
    s = [c * c * (3.0 - 2.0 * c) for c in t]
    one = np.int32(1)

    def along_x(y: Int32[np.ndarray, "n"], z: Int32[np.ndarray, "n"]) -> Tones:
        low = _uniform((cell[0], y, z), salt)
        return low + (_uniform((cell[0] + one, y, z), salt) - low) * s[0]

    def along_y(z: Int32[np.ndarray, "n"]) -> Tones:
        low = along_x(cell[1], z)
        return low + (along_x(cell[1] + one, z) - low) * s[1]

    low = along_y(cell[2])
    return low + (along_y(cell[2] + one) - low) * s[2]


def _fraction(v: Tones) -> Tones:
    return v - np.floor(v)


def _step(inside: np.ndarray) -> Tones:
    return inside.astype(np.float32)


# ---- patterns: point in units of the period -> tone -------------------------------------------


def _stripes(p: Points, t: Texture) -> Tones:
    return _step(_fraction(p[1]) < t.duty)


def _three_stripes(p: Points, t: Texture) -> Tones:
    return np.floor(_fraction(p[1]) * 3.0)


def _pinstripes(p: Points, t: Texture) -> Tones:
    y = _fraction(p[1])
    return _step(y < 0.22) + 2.0 * _step((y > 0.5) & (y < 0.62))


def _checks(p: Points, t: Texture) -> Tones:
    return np.floor(_fraction(0.5 * (np.floor(p[0]) + np.floor(p[1]) + np.floor(p[2]))) * 2.0)


def _dots(p: Points, t: Texture) -> Tones:
    # Odd layers are shifted by half a cell, so that every face of a box shows dots.
    odd = _fraction(0.5 * np.floor(p[1]))
    x, y, z = (_fraction(c) - 0.5 for c in (p[0] + odd, p[1], p[2] + odd))
    radius = 0.72 * (0.6 + 0.4 * t.duty)
    return _step(x * x + 0.5 * y * y + z * z < radius * radius * 0.5)


def _rings(p: Points, t: Texture) -> Tones:
    return _step(_fraction(np.sqrt(p[0] * p[0] + p[1] * p[1] + 0.3 * p[2] * p[2])) < t.duty)


def _noise(p: Points, t: Texture) -> Tones:
    value = value_noise(p, t.salt)
    return _step(value > 0.56 - 0.2 * (t.duty - 0.475)) + _step(value > 0.72)


def _marble(p: Points, t: Texture) -> Tones:
    warp = value_noise(p * np.float32(0.6), t.salt)
    ramp = _fraction(0.5 * p[1] + 1.6 * warp)
    return 1.15 * np.abs(2.0 * ramp - 1.0)


def _zigzag(p: Points, t: Texture) -> Tones:
    fold = np.abs(2.0 * _fraction(0.7 * (p[0] + p[2])) - 1.0)
    return _step(_fraction(p[1] + 0.6 * fold) < t.duty)


def _grid(p: Points, t: Texture) -> Tones:
    lines = [_fraction(c) < _LINE for c in p]
    return _step(lines[0] | lines[1] | lines[2])


def _spots(p: Points, t: Texture) -> Tones:
    cell, inside = _split(p)
    x, y, z = (c - 0.5 for c in inside)
    size = _uniform(cell, t.salt)
    radius = _CELL_RADIUS * (0.55 + 0.8 * size)
    figure = _step(x * x + y * y + z * z < radius * radius + 0.06)
    return figure * (1.0 + _step(size > 0.6))


def _bands(p: Points, t: Texture) -> Tones:
    # Uneven stripes, like a bar code: every thin layer has a random colour.
    layer = np.floor(p[1]).astype(np.int32)
    none = np.zeros_like(layer)
    return np.floor(_uniform((none, layer, none), t.salt) * 3.0)


def _mosaic(p: Points, t: Texture) -> Tones:
    cell, _ = _split(p)
    return np.floor(_uniform(cell, t.salt) * 3.0)


def _ramp(p: Points, t: Texture) -> Tones:
    return 2.0 * np.abs(2.0 * _fraction(p[1]) - 1.0)


def _half(p: Points, t: Texture) -> Tones:
    side = p[1] - t.phase[1] + 0.4 * (p[0] - t.phase[0])
    return _step(side > 0.0) + _step(np.abs(side) < 0.16)


def _tartan(p: Points, t: Texture) -> Tones:
    bands = [_step(_fraction(c) < 0.42) for c in (p[0] + p[2], p[1])]
    return bands[0] + bands[1]


class Pattern(NamedTuple):
    """A function of points (in units of the period) to tones, and its range of periods."""

    tone: Callable[[Points, Texture], Tones]
    periods: tuple[float, float]


PATTERNS: dict[str, Pattern] = {
    "stripes": Pattern(_stripes, (0.3, 0.5)),
    "three_stripes": Pattern(_three_stripes, (0.5, 0.8)),
    "pinstripes": Pattern(_pinstripes, (0.45, 0.65)),
    "checks": Pattern(_checks, (0.25, 0.42)),
    "dots": Pattern(_dots, (0.36, 0.5)),
    "rings": Pattern(_rings, (0.3, 0.48)),
    "noise": Pattern(_noise, (0.26, 0.42)),
    "marble": Pattern(_marble, (0.3, 0.5)),
    "zigzag": Pattern(_zigzag, (0.32, 0.5)),
    "grid": Pattern(_grid, (0.34, 0.52)),
    "spots": Pattern(_spots, (0.34, 0.52)),
    "bands": Pattern(_bands, (0.13, 0.2)),
    "mosaic": Pattern(_mosaic, (0.25, 0.42)),
    "ramp": Pattern(_ramp, (0.9, 1.4)),
    "half": Pattern(_half, (0.9, 1.1)),
    "tartan": Pattern(_tartan, (0.45, 0.65)),
}
