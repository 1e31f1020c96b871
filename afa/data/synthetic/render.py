"""Renders procedural objects: a catalogue view and any number of in-the-wild views.

Ray casting with a parallel projection and closed-form intersections (`solids`), one light with
shadows, a table and a wall. All operations are exactly rounded, so that the pixels are identical on
every machine. Only NumPy is imported, so that rendering processes start fast.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int16, UInt8

from afa.data.synthetic.objects import (
    CATALOGUE_AZIMUTH,
    CATALOGUE_ELEVATION,
    Surface,
    object_surfaces,
    outline,
    view_frame,
)
from afa.data.synthetic.shapes import KINDS, part
from afa.data.synthetic.solids import (
    MISS,
    Matrix,
    Part,
    Vector,
    apply,
    bounds,
    hit,
    normals,
    place,
    product,
    sincos,
    transpose,
    turn,
)
from afa.data.synthetic.textures import Draw, Texture, draw_texture, paint

VERSION = 1
"""Version of the rendered images; part of every cache key and fingerprint."""

# Azimuth relative to the camera and elevation, in degrees. The first light is used for shading,
# all of them for (soft) shadows.
STUDIO_LIGHTS = (
    (-48.0, 58.0),
    (-36.0, 62.0),
    (-58.0, 64.0),
    (-44.0, 70.0),
    (-30.0, 52.0),
    (-64.0, 54.0),
)
SAMPLES = 2  # rays per pixel along each side
MAX_TURN = 60.0  # largest azimuth from the catalogue view in the wild, in degrees
SHADOW_BIAS = 0.015  # in object units; avoids self-shadowing
_STREAM_VIEW = 2


class Light(NamedTuple):
    """Unit direction towards the light, its colour, and ambient colours from above and below."""

    direction: Vector
    colour: Vector
    sky: Vector
    ground: Vector


class Camera(NamedTuple):
    """Parallel projection: a point p appears at (frame @ p)[:2], divided by half_width."""

    frame: Matrix
    centre: tuple[float, float]
    half_width: float


class Backdrop(NamedTuple):
    """A table at `height` and a wall at `distance` facing `forward`; texture None is plain grey."""

    height: float
    forward: Vector
    distance: float
    table: Texture | None
    wall: Texture | None


# ---- ray casting ------------------------------------------------------------------------------


def _cast(
    surfaces: list[Surface], camera: Camera, side: int
) -> tuple[
    Float32[np.ndarray, "m"],
    Float32[np.ndarray, "m"],
    Float32[np.ndarray, "m m"],
    Int16[np.ndarray, "m m"],
]:
    """Returns x and y of the rays, and the depth and index of the nearest part (-1: none)."""
    ramp = (np.arange(side, dtype=np.float32) + 0.5) * np.float32(2.0 / side) - 1.0
    xs = ramp * camera.half_width + camera.centre[0]
    ys = -ramp * camera.half_width + camera.centre[1]  # row 0 is the top
    depth = np.full((side, side), MISS)
    owner = np.full((side, side), -1, np.int16)
    for index, surface in enumerate(surfaces):
        x, y, half_x, half_y = bounds(surface.part, camera.frame)
        columns, rows = _inside(xs, x, half_x), _inside(ys, y, half_y)
        if columns.start == columns.stop or rows.start == rows.stop:
            continue
        found = hit(surface.part, camera.frame, xs[None, columns], ys[rows, None])
        nearer = found > depth[rows, columns]
        np.copyto(depth[rows, columns], found, where=nearer)
        owner[rows, columns][nearer] = index
    return xs, ys, depth, owner


def _inside(values: Float32[np.ndarray, "m"], centre: float, half: float) -> slice:
    """Returns the slice of the (monotonic) values within `half` of `centre`."""
    found = np.flatnonzero(np.abs(values - np.float32(centre)) <= np.float32(half))
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)


def _shadow(
    surfaces: list[Surface], direction: Vector, points: Float32[np.ndarray, "3 n"]
) -> Bool[np.ndarray, "n"]:
    """Returns which points are in the shadow of another part, by casting rays to the light."""
    frame = _facing(direction)
    u, v, w = place(points, frame)
    w = w + np.float32(SHADOW_BIAS)
    dark = np.zeros(u.shape, bool)
    for surface in surfaces:
        x, y, half_x, half_y = (np.float32(b) for b in bounds(surface.part, frame))
        near = np.flatnonzero((np.abs(u - x) <= half_x) & (np.abs(v - y) <= half_y))
        if near.size:
            dark[near] |= hit(surface.part, frame, u[near], v[near]) > w[near]
    return dark


def _facing(direction: Vector) -> Matrix:
    """Returns an orthonormal frame whose third row is `direction`, which must not be vertical."""
    x, y, z = direction
    flat = float(np.sqrt(x * x + z * z))
    right = (z / flat, 0.0, -x / flat)
    up = (y * right[2], z * right[0] - x * right[2], -y * right[0])
    return (right, up, direction)


def _towards(azimuth: float, elevation: float) -> Vector:
    """Returns the unit vector at an azimuth from +z and an elevation, in degrees."""
    sine, cosine = sincos(azimuth)
    up, flat = sincos(elevation)
    return (sine * flat, up, cosine * flat)


def _world(
    camera: Camera,
    x: Float32[np.ndarray, "n"],
    y: Float32[np.ndarray, "n"],
    depth: Float32[np.ndarray, "n"],
) -> Float32[np.ndarray, "3 n"]:
    return np.stack(place(np.stack([x, y, depth]), transpose(camera.frame)))


def _illuminate(
    albedo: Float32[np.ndarray, "3 n"],
    normal: Float32[np.ndarray, "3 n"],
    lit: Float32[np.ndarray, "n"],
    light: Light,
    viewer: Vector,
    gloss: float,
) -> Float32[np.ndarray, "3 n"]:
    """Lambertian shading with one light and ambient light, plus a Blinn highlight."""
    lx, ly, lz = light.direction
    facing = np.maximum(lx * normal[0] + ly * normal[1] + lz * normal[2], np.float32(0)) * lit
    above = 0.5 + 0.5 * normal[1]
    half = [a + b for a, b in zip(light.direction, viewer, strict=True)]
    length = float(np.sqrt(half[0] * half[0] + half[1] * half[1] + half[2] * half[2]))
    shine = (half[0] * normal[0] + half[1] * normal[1] + half[2] * normal[2]) * (1.0 / length)
    shine = np.maximum(shine, np.float32(0))
    for _ in range(5):  # to the power 32
        shine = shine * shine
    shine = shine * lit * gloss
    out = [
        albedo[i]
        * (facing * light.colour[i] + light.ground[i] + (light.sky[i] - light.ground[i]) * above)
        + shine * light.colour[i]
        for i in range(3)
    ]
    return np.stack(out)


def _shade(
    surfaces: list[Surface],
    camera: Camera,
    light: Light,
    backdrop: Backdrop,
    shadow_lights: tuple[Vector, ...],
    side: int,
) -> Float32[np.ndarray, "3 m m"]:
    """Returns linear RGB on a side x side grid of rays."""
    xs, ys, depth, owner = _cast(surfaces, camera, side)
    table_depth, wall_depth = _backdrop_depths(backdrop, camera, xs, ys)
    behind = np.maximum(table_depth, wall_depth)
    on_table = table_depth >= wall_depth
    solid = depth > behind
    depth = np.where(solid, depth, behind)
    owner = np.where(solid, owner, np.int16(-1)).ravel()
    grid_x = np.broadcast_to(xs[None, :], depth.shape).ravel()
    grid_y = np.broadcast_to(ys[:, None], depth.shape).ravel()
    points = _world(camera, grid_x, grid_y, depth.ravel())

    lit = np.zeros(side * side, np.float32)
    for direction in shadow_lights:
        lit += ~_shadow(surfaces, direction, points)
    lit *= np.float32(1.0 / len(shadow_lights))

    viewer = camera.frame[2]
    out = np.empty((3, side * side), np.float32)
    plain = on_table.ravel()
    for chosen, normal, texture in (
        (plain, (0.0, 1.0, 0.0), backdrop.table),
        (~plain, backdrop.forward, backdrop.wall),
    ):
        index = np.flatnonzero(chosen & (owner < 0))
        if not index.size:
            continue
        if texture is None:
            shade = np.float32(0.62) + np.float32(0.38) * lit[index]
            out[:, index] = np.float32(0.9) * shade
            continue
        albedo = paint(texture, points[:, index], 1)
        flat = np.broadcast_to(np.array(normal, np.float32)[:, None], albedo.shape)
        out[:, index] = _illuminate(albedo, flat, lit[index], light, viewer, 0.0)
    for number, surface in enumerate(surfaces):
        index = np.flatnonzero(owner == number)
        if not index.size:
            continue
        at = points[:, index]
        albedo = paint(surface.texture, at, surface.part.role)
        out[:, index] = _illuminate(
            albedo, normals(surface.part, at), lit[index], light, viewer, 0.25
        )
    return out.reshape(3, side, side)


def _backdrop_depths(
    backdrop: Backdrop,
    camera: Camera,
    xs: Float32[np.ndarray, "m"],
    ys: Float32[np.ndarray, "m"],
) -> tuple[Float32[np.ndarray, "m m"], Float32[np.ndarray, "m m"]]:
    """Returns the depths at which each ray meets the table and the wall."""
    depths = []
    planes = (((0.0, 1.0, 0.0), backdrop.height), (backdrop.forward, -backdrop.distance))
    for normal, offset in planes:
        kx, ky, kd = apply(camera.frame, normal)
        scale = 1.0 / max(kd, 0.05)
        row = (-kx * scale) * xs + np.float32(offset * scale)
        depths.append(row[None, :] + ((-ky * scale) * ys)[:, None])
    return depths[0], depths[1]


# ---- from linear light to pixels ----------------------------------------------------------------


def _to_gamma(linear: Float32[np.ndarray, "3 m m"]) -> Float32[np.ndarray, "3 s s"]:
    """Averages the rays of each pixel and applies a gamma of 2."""
    total = linear[:, 0::SAMPLES, 0::SAMPLES].copy()
    for i in range(SAMPLES):
        for j in range(SAMPLES):
            if i or j:
                total += linear[:, i::SAMPLES, j::SAMPLES]
    return np.sqrt(np.clip(total * np.float32(1.0 / SAMPLES**2), 0, 1))


def _blur(image: Float32[np.ndarray, "3 s s"], spread: float) -> Float32[np.ndarray, "3 s s"]:
    """Blurs with a separable kernel (1 - (i / reach)²)² of about `spread` pixels (sigma)."""
    reach = 2.65 * spread + 1e-3
    taps = range(-int(reach), int(reach) + 1)
    roots = [1.0 - (i / reach) * (i / reach) for i in taps]
    weights = [root * root for root in roots]
    total = 0.0
    for weight in weights:
        total += weight
    for axis in (1, 2):
        count = image.shape[axis]
        out = np.zeros_like(image)
        for i, weight in zip(taps, weights, strict=True):
            index = np.clip(np.arange(count) + i, 0, count - 1)
            out += image.take(index, axis) * np.float32(weight / total)
        image = out
    return image


def _to_bytes(image: Float32[np.ndarray, "3 s s"]) -> UInt8[np.ndarray, "s s 3"]:
    levels = np.floor(np.clip(image, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))


def _frame_object(parts: tuple[Part, ...], frame: Matrix, fill: float, shift: Vector) -> Camera:
    """Returns a camera for which the longer side of the object is `fill` of the image side."""
    left, right, low, high = outline(parts, frame)[1]
    half = 0.5 * max(right - left, high - low) / fill
    centre_x = 0.5 * (left + right) - shift[0] * half
    centre_y = 0.5 * (low + high) - shift[1] * half
    return Camera(frame, (centre_x, centre_y), half)


def _base(parts: tuple[Part, ...]) -> float:
    """Height of the lowest point of an object."""
    upright = view_frame(0.0, 0.0, 0.0)
    return outline(parts, upright)[1][2]


def _catalogue(surfaces: list[Surface], size: int) -> UInt8[np.ndarray, "s s 3"]:
    parts = tuple(s.part for s in surfaces)
    frame = view_frame(-CATALOGUE_AZIMUTH, CATALOGUE_ELEVATION, 0.0)
    camera = _frame_object(parts, frame, 0.84, (0.0, 0.02, 0.0))
    keys = tuple(_towards(CATALOGUE_AZIMUTH + yaw, rise) for yaw, rise in STUDIO_LIGHTS)
    light = Light(keys[0], (0.72, 0.71, 0.69), (0.5, 0.5, 0.52), (0.24, 0.24, 0.25))
    backdrop = Backdrop(_base(parts), _towards(CATALOGUE_AZIMUTH, 0.0), 9.0, None, None)
    linear = _shade(surfaces, camera, light, backdrop, keys, size * SAMPLES)
    return _to_bytes(_to_gamma(linear))


# ---- in the wild --------------------------------------------------------------------------------


def _tint(draw: Draw, strength: float) -> Vector:
    """Draws a light colour: white with a random shift to warm or cold and to green or magenta."""
    warm, green = draw.uniform(-strength, strength), draw.uniform(-0.4, 0.4) * strength
    return (1.0 + warm, 1.0 + green, 1.0 - warm)


def _scaled(colour: Vector, factor: float) -> Vector:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _wild_light(draw: Draw, azimuth: float) -> Light:
    colour, fill = _tint(draw, 0.32), _tint(draw, 0.26)
    strong, soft = draw.uniform(0.55, 1.1), draw.uniform(0.2, 0.42)
    direction = _towards(azimuth + draw.uniform(-85.0, 85.0), draw.uniform(25.0, 70.0))
    sky = _scaled(fill, soft)
    return Light(direction, _scaled(colour, strong), sky, _scaled(sky, 0.5))


def _clutter(draw: Draw, base: float, azimuth: float) -> list[Surface]:
    """Draws distractor objects on the table, mostly behind and beside the object."""
    surfaces = []
    for _ in range(draw.integer(3, 6)):
        texture = draw_texture(draw)
        yaw, far = azimuth + draw.uniform(65.0, 295.0), draw.uniform(1.3, 2.4)
        x, _, z = _towards(yaw, 0.0)
        wide, tall = draw.uniform(0.2, 0.5), draw.uniform(0.2, 0.65)
        y = base + tall
        for _ in range(draw.integer(1, 2)):
            rotation = turn(1, draw.uniform(0.0, 360.0))
            scale = (wide, tall, wide * draw.uniform(0.6, 1.0))
            kind, role = draw.pick(KINDS), draw.pick((0, 1, 1, 2))
            thing = part(kind, (x * far, y, z * far), scale, role, rotation)
            surfaces.append(Surface(thing, texture))
            wide, next_tall = wide * draw.uniform(0.5, 0.9), tall * draw.uniform(0.4, 0.8)
            y, tall = y + tall + next_tall, next_tall
    return surfaces


def _occluders(draw: Draw, camera: Camera) -> list[Surface]:
    """Draws, for half of the images, an occluder between the camera and the object."""
    surfaces = []
    for _ in range(draw.integer(0, 1)):
        around = _towards(draw.uniform(0.0, 360.0), 0.0)
        reach = camera.half_width * draw.uniform(0.68, 0.98)
        x, y = (c + reach * a for c, a in zip(camera.centre, around[::2], strict=True))
        at = apply(transpose(camera.frame), (x, y, 3.0))
        tumble = product(turn(1, draw.uniform(0.0, 360.0)), turn(0, draw.uniform(0.0, 360.0)))
        thin, long = draw.uniform(0.12, 0.26), draw.uniform(0.3, 0.7)
        scale = tuple(camera.half_width * s for s in (thin, long, thin))
        thing = part(draw.pick(KINDS), at, (scale[0], scale[1], scale[2]), 1, tumble)
        surfaces.append(Surface(thing, draw_texture(draw)))
    return surfaces


def _coarse(draw: Draw) -> Texture:
    """Draws a texture for a wall or a table, with a larger period and lower contrast."""
    texture = draw_texture(draw)
    ground, figure, accent = texture.colours
    contrast = draw.uniform(0.1, 0.6)

    def pale(colour: Vector) -> Vector:
        r, g, b = (
            0.5 * (x + y) * (1.0 - contrast) + c * contrast
            for x, y, c in zip(ground, figure, colour, strict=True)
        )
        return (r, g, b)

    return texture._replace(
        colours=(pale(ground), pale(figure), pale(accent)),
        period=texture.period * draw.uniform(1.3, 2.8),
    )


def _wild(surfaces: list[Surface], draw: Draw, size: int) -> UInt8[np.ndarray, "s s 3"]:
    parts = tuple(s.part for s in surfaces)
    azimuth = CATALOGUE_AZIMUTH + draw.uniform(-MAX_TURN, MAX_TURN)
    frame = view_frame(-azimuth, draw.uniform(6.0, 42.0), draw.uniform(-14.0, 14.0))
    shift = (draw.uniform(-0.16, 0.16), draw.uniform(-0.16, 0.16), 0.0)
    camera = _frame_object(parts, frame, draw.uniform(0.66, 0.94), shift)
    light = _wild_light(draw, azimuth)
    base = _base(parts)
    facing = _towards(azimuth + draw.uniform(-30.0, 30.0), 0.0)
    backdrop = Backdrop(base, facing, draw.uniform(1.6, 3.0), _coarse(draw), _coarse(draw))
    scene = surfaces + _clutter(draw, base, azimuth) + _occluders(draw, camera)
    linear = _shade(scene, camera, light, backdrop, (light.direction,), size * SAMPLES)
    image = _to_gamma(linear)
    image = _blur(image, draw.uniform(0.0, 0.007) * size)
    grain = draw.field(4, *image.shape)
    bell = grain[0] + grain[1] + grain[2] + grain[3] - np.float32(2.0)  # deviation 1 / sqrt(3)
    return _to_bytes(image + bell * np.float32(draw.uniform(0.005, 0.045)))


def render(seed: int, object_index: int, view_index: int, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Renders one view of one object.

    Args:
      seed: seed of the data set.
      object_index: from 0; objects 4k .. 4k + 3 form a family.
      view_index: 0 is the catalogue view; 1 and above are different in-the-wild views.
      size: side of the image in pixels, at least 8.

    Returns:
      RGB image, identical on every machine for the same arguments.
    """
    surfaces = list(object_surfaces(seed, object_index))
    if view_index == 0:
        return _catalogue(surfaces, size)
    return _wild(surfaces, Draw(seed, _STREAM_VIEW, object_index, view_index), size)
