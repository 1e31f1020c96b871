"""Solid primitives under parallel rays: depth of the first intersection, and surface normals.

All rays of an image are parallel, so that in the coordinates of a part they share one direction,
and the ray equations have scalar coefficients. There are two kinds of part:

- lathe: x² + z² <= q0 + q1 y + q2 y², |y| <= 1, a capped quadric of revolution (ellipsoid,
  cylinder, cone, dome, barrel, waist), optionally with a cylindrical hole along its axis;
- polyhedron: the intersection of half-spaces n·p <= d (box, wedge, prism, pyramid).

Only operations that IEEE 754 rounds exactly are used (+, -, x, /, sqrt, comparisons; no BLAS, no
library sine, no sum of unspecified order), so that results are identical on every machine.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]

MISS = np.float32(-np.inf)
TINY = 1e-6  # smaller components count as zero: a ray is then parallel to the surface
CAP_EDGE = 0.9985  # |y| beyond which a point of a lathe belongs to its cap
IDENTITY: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class Part(NamedTuple):
    """One primitive, placed: world point = centre + rotation @ (scale * local point).

    Attributes:
      profile: (q0, q1, q2) of a lathe, or None for a polyhedron.
      hole: radius of a lathe's hole, as a fraction of its radius; 0 for none.
      planes: (nx, ny, nz, d) of a polyhedron, in local coordinates.
      role: which colours of the texture the part has (see `textures.paint`).
    """

    profile: Vector | None
    hole: float
    planes: tuple[tuple[float, float, float, float], ...]
    centre: Vector
    scale: Vector
    rotation: Matrix
    role: int


def sincos(degrees: float) -> tuple[float, float]:
    """Sine and cosine by a Taylor polynomial, accurate to about 1e-15, identical everywhere."""
    quarter = math.floor(degrees / 90.0 + 0.5)
    x = (degrees - 90.0 * quarter) * (math.pi / 180.0)
    xx = x * x
    sine, cosine = 0.0, 0.0
    for k in range(8, -1, -1):
        cosine = 1.0 - cosine * xx / ((2 * k + 1) * (2 * k + 2))
        sine = 1.0 - sine * xx / ((2 * k + 2) * (2 * k + 3))
    sine *= x
    return ((sine, cosine), (cosine, -sine), (-sine, -cosine), (-cosine, sine))[quarter % 4]


def turn(axis: int, degrees: float) -> Matrix:
    """Right-handed rotation matrix about axis 0, 1 or 2."""
    s, c = sincos(degrees)
    if axis == 0:
        return ((1.0, 0.0, 0.0), (0.0, c, -s), (0.0, s, c))
    if axis == 1:
        return ((c, 0.0, s), (0.0, 1.0, 0.0), (-s, 0.0, c))
    return ((c, -s, 0.0), (s, c, 0.0), (0.0, 0.0, 1.0))


def product(a: Matrix, b: Matrix) -> Matrix:
    """a @ b, in a fixed order of operations."""
    rows = [
        (
            r[0] * b[0][0] + r[1] * b[1][0] + r[2] * b[2][0],
            r[0] * b[0][1] + r[1] * b[1][1] + r[2] * b[2][1],
            r[0] * b[0][2] + r[1] * b[1][2] + r[2] * b[2][2],
        )
        for r in a
    ]
    return (rows[0], rows[1], rows[2])


def transpose(a: Matrix) -> Matrix:
    return (
        (a[0][0], a[1][0], a[2][0]),
        (a[0][1], a[1][1], a[2][1]),
        (a[0][2], a[1][2], a[2][2]),
    )


def apply(a: Matrix, v: Vector) -> Vector:
    """a @ v, in a fixed order of operations."""
    x, y, z = (r[0] * v[0] + r[1] * v[1] + r[2] * v[2] for r in a)
    return (x, y, z)


def radius_squared(profile: Vector, y: float) -> float:
    """A lathe's squared radius at height y of its axis."""
    return profile[0] + profile[1] * y + profile[2] * y * y


def _local_frame(part: Part, frame: Matrix) -> tuple[Matrix, Vector]:
    """(A, b) with local point = A @ (x, y, depth) + b for a point given in a viewing frame."""
    inverse = transpose(part.rotation)
    view = product(inverse, transpose(frame))
    shift = apply(inverse, part.centre)
    rows = [(r[0] / s, r[1] / s, r[2] / s) for r, s in zip(view, part.scale, strict=True)]
    b = (
        -shift[0] / part.scale[0],
        -shift[1] / part.scale[1],
        -shift[2] / part.scale[2],
    )
    return (rows[0], rows[1], rows[2]), b


def bounds(part: Part, frame: Matrix) -> tuple[float, float, float, float]:
    """Returns (x, y, half width, half height) of a bounding rectangle in a viewing frame."""
    x, y, _ = apply(frame, part.centre)
    axes = product(frame, part.rotation)
    half = [
        abs(r[0]) * part.scale[0] + abs(r[1]) * part.scale[1] + abs(r[2]) * part.scale[2]
        for r in axes[:2]
    ]
    return x, y, half[0], half[1]


def hit(
    part: Part, frame: Matrix, x: Float32[np.ndarray, "*a"], y: Float32[np.ndarray, "*b"]
) -> Float32[np.ndarray, "*c"]:
    """Returns the depth of the first intersection of rays from +depth with the part.

    Args:
      frame: orthonormal; rows are the right, up and towards-viewer directions.
      x, y: coordinates of the rays in the frame; broadcast against each other.

    Returns:
      Depth along the third row of `frame`, larger is nearer to the viewer; -inf for a miss.
    """
    a, b = _local_frame(part, frame)
    if part.profile is None:
        return _hit_polyhedron(part.planes, a, b, x, y)
    return _hit_lathe(part.profile, part.hole, a, b, x, y)


def _hit_polyhedron(
    planes: tuple[tuple[float, float, float, float], ...],
    a: Matrix,
    b: Vector,
    x: Float32[np.ndarray, "*a"],
    y: Float32[np.ndarray, "*b"],
) -> Float32[np.ndarray, "*c"]:
    near, far, inside = None, None, None
    for nx, ny, nz, d in planes:
        kx, ky, kd = apply(transpose(a), (nx, ny, nz))
        rest = d - (nx * b[0] + ny * b[1] + nz * b[2])
        if abs(kd) < TINY:
            within = kx * x + ky * y <= rest
            inside = within if inside is None else inside & within
            continue
        depth = (-kx / kd) * x + ((-ky / kd) * y + rest / kd)
        if kd > 0:
            near = depth if near is None else np.minimum(near, depth)
        else:
            far = depth if far is None else np.maximum(far, depth)
    if near is None or far is None:
        raise ValueError("a polyhedron must be bounded")
    met = near >= far
    return np.where(met if inside is None else met & inside, near, MISS)


def _hit_lathe(
    profile: Vector,
    hole: float,
    a: Matrix,
    b: Vector,
    x: Float32[np.ndarray, "*a"],
    y: Float32[np.ndarray, "*b"],
) -> Float32[np.ndarray, "*c"]:
    ox, oy, oz = (r[0] * x + (r[1] * y + shift) for r, shift in zip(a, b, strict=True))
    dx, dy, dz = a[0][2], a[1][2], a[2][2]
    # f(t) = x² + z² - q(y) along the ray is quad t² + 2 half t + rest; the ray comes from +inf and
    # enters the solid where f rises with t: at (-half + root) / quad whatever the sign of quad.
    across = dx * dx + dz * dz
    towards_axis = dx * ox + dz * oz
    axis_squared = ox * ox + oz * oz
    quad = across - profile[2] * dy * dy
    quad = quad if abs(quad) > TINY else TINY
    half = towards_axis - dy * (0.5 * profile[1] + profile[2] * oy)
    rest = axis_squared - (profile[0] + oy * (profile[1] + profile[2] * oy))
    depth = _side(half, rest, quad, 1.0, oy, dy)
    if hole and across > TINY:
        inner = _side(towards_axis, axis_squared - hole * hole, across, -1.0, oy, dy)
        depth = np.maximum(depth, inner)
    if abs(dy) > TINY:
        facing = 1.0 if dy > 0 else -1.0
        limit = radius_squared(profile, facing)
        if limit > TINY:
            t = (facing - oy) * (1.0 / dy)
            from_axis = axis_squared + t * (2.0 * towards_axis + across * t)
            on_cap = (from_axis <= limit) & (from_axis >= hole * hole)
            depth = np.maximum(depth, np.where(on_cap, t, MISS))
    return depth


def _side(
    half: Float32[np.ndarray, "*n"],
    rest: Float32[np.ndarray, "*n"],
    quad: float,
    sign: float,
    oy: Float32[np.ndarray, "*n"],
    dy: float,
) -> Float32[np.ndarray, "*n"]:
    """Root (-half + sign·sqrt(half² - quad·rest)) / quad where it lies between the two caps."""
    discriminant = half * half - quad * rest
    root = np.sqrt(np.maximum(discriminant, np.float32(0)))
    depth = (sign * root - half) * (1.0 / quad)
    return np.where((discriminant >= 0) & (np.abs(oy + dy * depth) <= 1.0), depth, MISS)


def normals(part: Part, points: Float32[np.ndarray, "3 n"]) -> Float32[np.ndarray, "3 n"]:
    """Unit outward normals at points of the part's surface, both in world coordinates."""
    inverse = transpose(part.rotation)
    offset = [points[i] - np.float32(part.centre[i]) for i in range(3)]
    px, py, pz = (
        (r[0] * offset[0] + r[1] * offset[1] + r[2] * offset[2]) * (1.0 / s)
        for r, s in zip(inverse, part.scale, strict=True)
    )
    if part.profile is None:
        local = _polyhedron_normals(part.planes, px, py, pz)
    else:
        local = _lathe_normals(part.profile, part.hole, px, py, pz)
    n = [component * (1.0 / s) for component, s in zip(local, part.scale, strict=True)]
    world = [r[0] * n[0] + r[1] * n[1] + r[2] * n[2] for r in part.rotation]
    length = np.sqrt(world[0] * world[0] + world[1] * world[1] + world[2] * world[2])
    scale = 1.0 / np.maximum(length, np.float32(TINY))
    return np.stack([component * scale for component in world])


def _polyhedron_normals(
    planes: tuple[tuple[float, float, float, float], ...],
    px: Float32[np.ndarray, "n"],
    py: Float32[np.ndarray, "n"],
    pz: Float32[np.ndarray, "n"],
) -> list[Float32[np.ndarray, "n"]]:
    """Returns the normal of the plane nearest to each point."""
    best = np.full(px.shape, MISS)
    normal = [np.zeros_like(px) for _ in range(3)]
    for nx, ny, nz, d in planes:
        outside = nx * px + ny * py + nz * pz - d
        nearer = outside > best
        best = np.where(nearer, outside, best)
        normal = [
            np.where(nearer, np.float32(new), old)
            for new, old in zip((nx, ny, nz), normal, strict=True)
        ]
    return normal


def _lathe_normals(
    profile: Vector,
    hole: float,
    px: Float32[np.ndarray, "n"],
    py: Float32[np.ndarray, "n"],
    pz: Float32[np.ndarray, "n"],
) -> list[Float32[np.ndarray, "n"]]:
    normal = [px, -(0.5 * profile[1] + profile[2] * py), pz]
    if hole:
        middle = 0.25 * (1.0 + hole) * (1.0 + hole)
        inwards: Bool[np.ndarray, "n"] = px * px + pz * pz < middle
        normal = [np.where(inwards, -component, component) for component in normal]
    for facing in (1.0, -1.0):
        if radius_squared(profile, facing) > TINY:
            cap = py * facing > CAP_EDGE
            flat = (0.0, facing, 0.0)
            normal = [
                np.where(cap, np.float32(f), component)
                for f, component in zip(flat, normal, strict=True)
            ]
    return normal


def place(points: Float[np.ndarray, "3 n"], frame: Matrix) -> list[Float[np.ndarray, "n"]]:
    """Transforms world points to a viewing frame: right, up, towards the viewer."""
    return [r[0] * points[0] + r[1] * points[1] + r[2] * points[2] for r in frame]
