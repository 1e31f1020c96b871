"""Definition of the objects: families of look-alikes that differ in shape or in texture.

A family has four objects: two shapes times two textures. Shape alone, or texture alone, does not
distinguish an object from one other member of its family.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from afa.data.synthetic.shapes import SHAPES, draw_shape
from afa.data.synthetic.solids import MISS, Matrix, Part, bounds, hit, product, turn
from afa.data.synthetic.textures import PALETTES, PATTERNS, Draw, Texture, draw_texture

FAMILY = 4  # objects per family: 2 shapes x 2 textures
SHARING, SHARED_PALETTES = 5, 3  # consecutive families that share this many palettes
CATALOGUE_AZIMUTH, CATALOGUE_ELEVATION = 32.0, 22.0  # degrees: the three-quarter view
LOOKALIKE = 0.72  # silhouette IoU above which the second shape of a family is drawn again
STRIPED = ("stripes", "three_stripes", "pinstripes", "bands")  # too similar for one family
_SHAPE_TRIES = 8
_OUTLINE_RAYS = 40  # per side
_STREAM_FAMILY, _STREAM_PALETTES = 1, 3


class Family(NamedTuple):
    """Two shapes and two textures; object k of the family is shape k // 2 with texture k % 2."""

    shapes: tuple[tuple[Part, ...], tuple[Part, ...]]
    kinds: tuple[str, str]
    textures: tuple[Texture, Texture]


class Surface(NamedTuple):
    """A part in the scene and its texture."""

    part: Part
    texture: Texture


@functools.lru_cache(maxsize=64)
def family(seed: int, index: int) -> Family:
    """Returns the family `index` of a data set.

    Even families have two shapes of the same kind (two teapots), odd ones of different kinds. The
    two textures alternate, every two families, between a shared palette and a shared pattern.
    """
    draw = Draw(seed, _STREAM_FAMILY, index)
    names = tuple(SHAPES)
    first = draw.pick(names)
    second = first if index % 2 == 0 else draw.pick([n for n in names if n != first])
    one = draw_shape(draw, first)
    two = draw_shape(draw, second)
    for _ in range(_SHAPE_TRIES):
        if _overlap(one, two) < LOOKALIKE:
            break
        two = draw_shape(draw, second)
    palettes = _shared_palettes(seed, index // SHARING)
    texture = draw_texture(draw, palette=draw.pick(palettes))
    if index % 4 < 2:
        similar = STRIPED if texture.pattern in STRIPED else (texture.pattern,)
        others = [name for name in PATTERNS if name not in similar]
        other = draw_texture(draw, draw.pick(others), texture.palette)
    else:
        others = [p for p in palettes if p != texture.palette]
        other = draw_texture(draw, texture.pattern, draw.pick(others))
    return Family((one, two), (first, second), (texture, other))


def _shared_palettes(seed: int, group: int) -> list[int]:
    """Returns the palettes that a group of families shares, so that colour is a weak cue.

    All palettes are used before one is used again.
    """
    cycle, position = divmod(group, len(PALETTES) // SHARED_PALETTES)
    draw, remaining = Draw(seed, _STREAM_PALETTES, cycle), list(range(len(PALETTES)))
    shuffled = [remaining.pop(draw.integer(0, len(remaining) - 1)) for _ in PALETTES]
    begin = position * SHARED_PALETTES
    return shuffled[begin : begin + SHARED_PALETTES]


def cues(object_index: int) -> tuple[int, int]:
    """Returns the (shape, texture) ids of an object, to test each cue alone."""
    base, member = divmod(object_index, FAMILY)
    return 2 * base + member // 2, 2 * base + member % 2


def object_surfaces(seed: int, object_index: int) -> tuple[Surface, ...]:
    """Returns the parts of an object with their texture."""
    base, member = divmod(object_index, FAMILY)
    members = family(seed, base)
    texture = members.textures[member % 2]
    return tuple(Surface(p, texture) for p in members.shapes[member // 2])


def view_frame(azimuth: float, elevation: float, roll: float) -> Matrix:
    """Returns the right, up and towards-viewer axes of a camera that looks at the origin."""
    return product(turn(2, roll), product(turn(0, elevation), turn(1, azimuth)))


def outline(
    parts: tuple[Part, ...], frame: Matrix
) -> tuple[Bool[np.ndarray, "n n"], tuple[float, float, float, float]]:
    """Returns a coarse silhouette and its bounding box (left, right, bottom, top)."""
    boxes = [bounds(p, frame) for p in parts]
    left, right = min(b[0] - b[2] for b in boxes), max(b[0] + b[2] for b in boxes)
    low, high = min(b[1] - b[3] for b in boxes), max(b[1] + b[3] for b in boxes)
    ramp = (np.arange(_OUTLINE_RAYS, dtype=np.float32) + 0.5) / np.float32(_OUTLINE_RAYS)
    xs = ramp * np.float32(right - left) + np.float32(left)
    ys = ramp * np.float32(high - low) + np.float32(low)
    mask = np.zeros((_OUTLINE_RAYS, _OUTLINE_RAYS), bool)
    for p in parts:
        mask |= hit(p, frame, xs[None, :], ys[:, None]) > MISS
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    half_x, half_y = 0.5 * (right - left) / _OUTLINE_RAYS, 0.5 * (high - low) / _OUTLINE_RAYS
    rectangle = (
        float(xs[columns[0]]) - half_x,
        float(xs[columns[-1]]) + half_x,
        float(ys[rows[0]]) - half_y,
        float(ys[rows[-1]]) + half_y,
    )
    return mask, rectangle


def _overlap(one: tuple[Part, ...], two: tuple[Part, ...]) -> float:
    """Intersection over union of two silhouettes, each scaled to its bounding box."""
    frame = view_frame(-CATALOGUE_AZIMUTH, CATALOGUE_ELEVATION, 0.0)
    a, b = outline(one, frame)[0], outline(two, frame)[0]
    return float(np.count_nonzero(a & b)) / float(np.count_nonzero(a | b))
