"""Random shapes assembled from solid parts: vessels, creatures, vehicles and others.

Object coordinates: x to the right, y up, z towards the viewer. The bounding box is centred on the
origin and its longest side is 2.
"""

from collections.abc import Callable

from afa.data.synthetic.solids import IDENTITY, Matrix, Part, Vector, bounds, product, turn
from afa.data.synthetic.textures import ACCENT, PATTERN, SWAPPED, Draw

_PROFILES: dict[str, Vector] = {
    "ellipsoid": (1.0, 0.0, -1.0),
    "cylinder": (1.0, 0.0, 0.0),
    "cone": (0.25, -0.5, 0.25),
    "frustum": (0.5625, -0.375, 0.0625),  # the top half as wide as the bottom
    "dome": (0.5, -0.5, 0.0),
    "barrel": (1.0, 0.0, -0.55),
    "waist": (0.25, 0.0, 0.75),
    "cup": (0.55, 0.45, 0.0),
}


def _prism(sides: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float, float, float], ...]:
    caps = ((0.0, 1.0, 0.0, 1.0), (0.0, -1.0, 0.0, 1.0))
    return (*((x, 0.0, z, 1.0) for x, z in sides), *caps)


_PLANES: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "box": _prism(((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))),
    "hexagon": _prism(
        ((1.0, 0.0), (-1.0, 0.0), (0.5, 1.0), (-0.5, 1.0), (0.5, -1.0), (-0.5, -1.0))
    ),
    # Slopes down towards +x.
    "wedge": (*_prism(((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))), (1.0, 1.0, 0.0, 0.6)),
    "roof": (
        (0.0, 1.0, 2.0, 1.0),
        (0.0, 1.0, -2.0, 1.0),
        (0.0, -1.0, 0.0, 1.0),
        (1.0, 0.0, 0.0, 1.0),
        (-1.0, 0.0, 0.0, 1.0),
    ),
    "pyramid": (
        (2.0, 1.0, 0.0, 1.0),
        (-2.0, 1.0, 0.0, 1.0),
        (0.0, 1.0, 2.0, 1.0),
        (0.0, 1.0, -2.0, 1.0),
        (0.0, -1.0, 0.0, 1.0),
    ),
    "octahedron": tuple(
        (x, y, z, 1.0) for x in (1.0, -1.0) for y in (1.0, -1.0) for z in (1.0, -1.0)
    ),
}
ROUND = ("ellipsoid", "barrel", "cylinder", "cup", "waist", "frustum")
TOPS = ("cone", "dome", "ellipsoid", "pyramid", "frustum")
BLOCKS = ("box", "hexagon", "barrel", "cylinder", "ellipsoid")
KINDS = (*_PROFILES, *_PLANES)


def part(
    kind: str,
    centre: Vector,
    scale: Vector,
    role: int = PATTERN,
    rotation: Matrix = IDENTITY,
    hole: float = 0.0,
) -> Part:
    """Returns a placed primitive by name; `scale` is half its extent along its own axes."""
    planes = _PLANES.get(kind, ())
    profile = None if planes else _PROFILES[kind]
    return Part(profile, hole, planes, centre, scale, rotation, role)


def _even(half: float) -> Vector:
    return (half, half, half)


def _mirror(parts: list[Part], axis: int) -> list[Part]:
    """Returns the parts and their mirror images. All primitives except the wedge are symmetric
    about each of their axes, and wedges are mirrored across z only."""
    images = []
    for p in parts:
        centre = [-c if i == axis else c for i, c in enumerate(p.centre)]
        rows = [
            tuple(-v if (i == axis) != (j == axis) else v for j, v in enumerate(row))
            for i, row in enumerate(p.rotation)
        ]
        images.append(p._replace(centre=tuple(centre), rotation=tuple(rows)))
    return parts + images


def _vessel(d: Draw) -> list[Part]:
    radius, height = d.uniform(0.5, 0.75), d.uniform(0.55, 0.95)
    belly = d.pick(ROUND)
    parts = [part(belly, (0.0, 0.0, 0.0), (radius, height, radius))]
    top = height
    if d.chance(0.7):
        neck, tall = radius * d.uniform(0.35, 0.6), d.uniform(0.15, 0.4)
        sunk = 0.12 if belly == "ellipsoid" else 0.0
        kind = d.pick(("cylinder", "cup", "waist"))
        parts.append(part(kind, (0.0, top + tall - sunk, 0.0), (neck, tall, neck), SWAPPED))
        top += 2 * tall - sunk
    if d.chance(0.6):
        lid = radius * d.uniform(0.4, 0.7)
        tall = d.uniform(0.1, 0.3)
        parts.append(part(d.pick(TOPS), (0.0, top + tall, 0.0), (lid, tall, lid), ACCENT))
    handle = d.uniform(0.3, 0.5)
    ring = part(
        "cylinder",
        (radius + 0.35 * handle, d.uniform(0.0, 0.3), 0.0),
        (handle, 0.1, handle),
        ACCENT,
        turn(0, 90.0),
        hole=d.uniform(0.62, 0.75),
    )
    style = d.integer(0, 2)
    if style == 0:
        parts += _mirror([ring], 0)
    elif style == 1:
        parts.append(ring)
        spout = product(turn(2, d.uniform(35.0, 60.0)), IDENTITY)
        long = d.uniform(0.35, 0.6)
        parts.append(part("frustum", (-radius - 0.2, 0.15, 0.0), (0.2, long, 0.2), SWAPPED, spout))
    else:
        foot = radius * d.uniform(0.7, 1.2)
        kind = d.pick(("frustum", "box", "cylinder", "hexagon"))
        parts.append(part(kind, (0.0, -height - 0.1, 0.0), (foot, 0.13, foot), ACCENT))
        stand = d.uniform(0.12, 0.22)
        parts += _mirror([part("ellipsoid", (radius, 0.0, 0.0), (stand, stand, stand), SWAPPED)], 0)
    return parts


def _creature(d: Draw) -> list[Part]:
    long, tall, wide = d.uniform(0.65, 0.95), d.uniform(0.35, 0.55), d.uniform(0.3, 0.45)
    body = d.pick(("ellipsoid", "box", "barrel", "cylinder"))
    lying = turn(2, 90.0)
    if body in ("barrel", "cylinder"):
        parts = [part(body, (0.0, 0.0, 0.0), (tall, long, wide), PATTERN, lying)]
    else:
        parts = [part(body, (0.0, 0.0, 0.0), (long, tall, wide))]
    head, up = d.uniform(0.26, 0.42), d.uniform(0.25, 0.75)
    at = (long + 0.1, up, 0.0)
    parts.append(part(d.pick(("ellipsoid", "box", "octahedron")), at, _even(head), SWAPPED))
    snout = d.uniform(0.12, 0.35)
    snout_part = part(
        "cone", (at[0] + head, up - 0.08, 0.0), (0.15, snout, 0.15), ACCENT, turn(2, -90.0)
    )
    parts.append(snout_part)
    ear, flap = d.uniform(0.1, 0.35), d.pick(("cone", "ellipsoid", "cylinder"))
    spread = turn(0, d.uniform(5.0, 40.0))
    ear_part = part(
        flap, (at[0] - 0.05, up + head + 0.5 * ear, 0.2), (0.1, ear, 0.1), ACCENT, spread
    )
    parts += _mirror([ear_part], 2)
    leg, thick = d.uniform(0.2, 0.5), d.uniform(0.09, 0.16)
    kind = d.pick(("cylinder", "box", "cone"))
    scale = (thick, leg, thick)
    place = (0.6 * long, -0.7 * tall - leg, 0.7 * wide)
    legs = [part(kind, place, scale, SWAPPED), part(kind, (-place[0], *place[1:]), scale, SWAPPED)]
    parts += _mirror(legs, 2)
    tail = d.uniform(0.2, 0.55)
    lean = turn(2, d.uniform(15.0, 80.0))
    parts.append(
        part(d.pick(("cone", "ellipsoid")), (-long, 0.25, 0.0), (0.12, tail, 0.12), ACCENT, lean)
    )
    return parts


def _vehicle(d: Draw) -> list[Part]:
    long, tall, wide = d.uniform(0.85, 1.05), d.uniform(0.18, 0.36), d.uniform(0.38, 0.55)
    parts = [part("box", (0.0, 0.0, 0.0), (long, tall, wide))]
    cab, high = d.uniform(0.25, 0.5), d.uniform(0.2, 0.4)
    x = d.uniform(-0.5, 0.3)
    kind = d.pick(("box", "wedge", "dome", "barrel", "roof"))
    parts.append(part(kind, (x, tall + high, 0.0), (cab, high, 0.9 * wide), SWAPPED))
    wheel = d.uniform(0.2, 0.36)
    sideways = turn(0, 90.0)
    places = (-0.6, 0.6) if d.chance(0.6) else (-0.68, 0.0, 0.68)
    hole = d.pick((0.0, 0.5))
    wheels = [
        part("cylinder", (px * long, -tall, wide), (wheel, 0.1, wheel), ACCENT, sideways, hole)
        for px in places
    ]
    parts += _mirror(wheels, 2)
    rear = x - cab - 0.25 if x > -0.1 else x + cab + 0.25
    load = d.integer(0, 3)
    if load == 0:
        stack = d.uniform(0.2, 0.5)
        parts.append(
            part(
                d.pick(("cylinder", "cup", "waist")), (rear, tall + stack, 0.0), (0.14, stack, 0.14)
            )
        )
    elif load == 1:
        parts.append(
            part("barrel", (rear, tall + 0.2, 0.0), (0.24, 0.36, 0.24), PATTERN, turn(0, 90.0))
        )
    elif load == 2:
        ball = d.uniform(0.2, 0.3)
        parts.append(part("ellipsoid", (rear, tall + ball, 0.0), (ball, ball, ball)))
    nose = d.uniform(0.15, 0.3)
    if d.chance(0.6):
        kind = d.pick(("ellipsoid", "cylinder", "octahedron"))
        parts += _mirror([part(kind, (long, 0.05, 0.6 * wide), _even(nose * 0.5), ACCENT)], 2)
    else:
        parts.append(
            part("wedge", (long + nose, -0.2 * tall, 0.0), (nose, 0.8 * tall, wide), SWAPPED)
        )
    return parts


def _rocket(d: Draw) -> list[Part]:
    radius, height = d.uniform(0.26, 0.45), d.uniform(0.55, 0.85)
    parts = [
        part(
            d.pick(("cylinder", "barrel", "hexagon", "ellipsoid")),
            (0.0, 0.0, 0.0),
            (radius, height, radius),
        )
    ]
    tip = d.uniform(0.2, 0.45)
    top = height + tip - 0.06
    parts.append(
        part(
            d.pick(("cone", "dome", "ellipsoid", "pyramid")),
            (0.0, top, 0.0),
            (radius, tip, radius),
            ACCENT,
        )
    )
    fin, tall = d.uniform(0.2, 0.4), d.uniform(0.2, 0.45)
    x, y = radius + 0.6 * fin, -height + tall * d.uniform(0.2, 1.6)
    kind = d.pick(("wedge", "box", "ellipsoid"))
    parts += [
        part(kind, turned(yaw, x, y), (fin, tall, 0.07), SWAPPED, turn(1, yaw))
        for yaw in ((0.0, 120.0, 240.0) if d.chance(0.5) else (0.0, 90.0, 180.0, 270.0))
    ]
    nozzle = radius * d.uniform(0.6, 1.1)
    parts.append(
        part(
            d.pick(("frustum", "cylinder")),
            (0.0, -height - 0.12, 0.0),
            (nozzle, 0.16, nozzle),
            ACCENT,
        )
    )
    if d.chance(0.5):
        belt = radius * d.uniform(1.1, 1.35)
        parts.append(part("cylinder", (0.0, d.uniform(-0.2, 0.4), 0.0), (belt, 0.06, belt), ACCENT))
    return parts


def turned(yaw: float, x: float, y: float) -> Vector:
    """Returns the point at distance x from the vertical axis, angle `yaw` in degrees, height y."""
    row = turn(1, yaw)
    return (row[0][0] * x, y, row[2][0] * x)


def _lamp(d: Draw) -> list[Part]:
    stem, height = d.uniform(0.08, 0.24), d.uniform(0.4, 0.75)
    parts = [
        part(
            d.pick(("cylinder", "waist", "frustum", "hexagon")),
            (0.0, 0.0, 0.0),
            (stem, height, stem),
            SWAPPED,
        )
    ]
    base = d.uniform(0.35, 0.6)
    parts.append(
        part(
            d.pick(("cylinder", "dome", "box", "hexagon")),
            (0.0, -height, 0.0),
            (base, 0.13, base),
            ACCENT,
        )
    )
    cap, tall = d.uniform(0.55, 0.9), d.uniform(0.22, 0.48)
    kind = d.pick(("dome", "cone", "ellipsoid", "frustum", "octahedron", "cup"))
    parts.append(part(kind, (0.0, height + 0.5 * tall, 0.0), (cap, tall, cap)))
    extra = d.integer(0, 2)
    if extra == 0:
        knob = d.uniform(0.12, 0.2)
        parts.append(part("ellipsoid", (0.0, height + 1.5 * tall + knob, 0.0), _even(knob), ACCENT))
    elif extra == 1:
        arm = d.uniform(0.3, 0.45)
        lean = turn(2, d.uniform(40.0, 75.0))
        parts += _mirror([part("ellipsoid", (-arm, -0.1, 0.0), (0.12, arm, 0.2), ACCENT, lean)], 0)
    else:
        small = d.uniform(0.2, 0.3)
        side = 0.45
        parts.append(
            part("cylinder", (side, -0.5 * height, 0.2), (0.09, 0.5 * height, 0.09), SWAPPED)
        )
        parts.append(part(kind, (side, 0.1, 0.2), (small, 0.6 * small, small)))
    return parts


def _seat(d: Draw) -> list[Part]:
    wide, deep, thick = d.uniform(0.5, 0.8), d.uniform(0.45, 0.65), d.uniform(0.1, 0.22)
    round_seat = d.chance(0.4)
    parts = [part("cylinder" if round_seat else "box", (0.0, 0.0, 0.0), (wide, thick, deep))]
    leg, foot = d.uniform(0.25, 0.5), d.uniform(0.07, 0.13)
    spread = 0.65 if round_seat else 0.85
    at = (spread * wide, -thick - leg, spread * deep)
    kind = d.pick(("cylinder", "box", "cone"))
    scale = (foot, leg, foot)
    if d.chance(0.75):
        legs = [part(kind, at, scale, ACCENT), part(kind, (at[0], at[1], -at[2]), scale, ACCENT)]
        parts += _mirror(legs, 0)
    else:
        parts.append(part("waist", (0.0, at[1], 0.0), (0.45 * wide, leg, 0.45 * wide), ACCENT))
    back = d.uniform(0.3, 0.65)
    kind = d.pick(("box", "ellipsoid", "ring", "hexagon"))
    if kind == "ring":
        place = (0.0, thick + 0.9 * wide, -0.8 * deep)
        parts.append(part("cylinder", place, (wide, 0.1, wide), SWAPPED, turn(0, 90.0), hole=0.6))
    else:
        place = (0.0, thick + back, -0.85 * deep)
        parts.append(part(kind, place, (0.95 * wide, back, 0.1), SWAPPED))
    style = d.integer(0, 2)
    if style == 0:
        arm = part("cylinder", (wide, 0.3, 0.0), (0.1, 0.8 * deep, 0.1), ACCENT, turn(0, 90.0))
        parts += _mirror([arm], 0)
    elif style == 1:
        ball = d.uniform(0.22, 0.32)
        kind = d.pick(("ellipsoid", "octahedron", "box"))
        parts.append(part(kind, (0.0, thick + ball, 0.1), _even(ball), ACCENT))
    return parts


def _robot(d: Draw) -> list[Part]:
    wide, tall = d.uniform(0.32, 0.5), d.uniform(0.35, 0.55)
    parts = [part(d.pick((*BLOCKS, "waist", "cup")), (0.0, 0.0, 0.0), (wide, tall, 0.75 * wide))]
    head = d.uniform(0.2, 0.36)
    kind = d.pick(("box", "ellipsoid", "cylinder", "dome", "hexagon", "octahedron"))
    parts.append(part(kind, (0.0, tall + head, 0.0), _even(head), SWAPPED))
    if d.chance(0.6):
        tall_hat = d.uniform(0.1, 0.28)
        kind = d.pick(("cone", "cylinder", "ellipsoid"))
        parts.append(
            part(kind, (0.0, tall + 2 * head + 0.7 * tall_hat, 0.0), (0.14, tall_hat, 0.14), ACCENT)
        )
    arm, raised = d.uniform(0.3, 0.5), d.uniform(15.0, 150.0)
    kind = d.pick(("cylinder", "box", "ellipsoid"))
    lean = turn(2, raised)
    shoulder = (wide + 0.1 - lean[0][1] * arm, 0.5 * tall - lean[1][1] * arm, 0.0)
    hand = (shoulder[0] - lean[0][1] * arm, shoulder[1] - lean[1][1] * arm, 0.0)
    limbs = [part(kind, shoulder, (0.1, arm, 0.1), SWAPPED, lean)]
    limbs.append(part(d.pick(("ellipsoid", "box", "octahedron")), hand, _even(0.16), ACCENT))
    leg = d.uniform(0.2, 0.45)
    if d.chance(0.7):
        limbs.append(part(kind, (0.55 * wide, -tall - leg, 0.0), (0.14, leg, 0.14), SWAPPED))
        limbs.append(part("box", (0.55 * wide, -tall - 2 * leg, 0.1), (0.17, 0.08, 0.26), ACCENT))
    else:
        parts.append(
            part(
                d.pick(("frustum", "cone", "dome")),
                (0.0, -tall - leg, 0.0),
                (wide, leg, wide),
                ACCENT,
            )
        )
    return parts + _mirror(limbs, 0)


def _plane(d: Draw) -> list[Part]:
    long, thick = d.uniform(0.8, 1.0), d.uniform(0.17, 0.3)
    lying = turn(2, -90.0)
    hull = d.pick(("ellipsoid", "cylinder", "barrel", "hexagon"))
    parts = [part(hull, (0.0, 0.0, 0.0), (thick, long, thick), PATTERN, lying)]
    wing, chord = d.uniform(0.4, 0.65), d.uniform(0.18, 0.35)
    kind, x = d.pick(("box", "ellipsoid", "roof")), d.uniform(-0.2, 0.3)
    sweep = turn(1, d.uniform(-25.0, 25.0))
    wings = [part(kind, (x, 0.0, thick + 0.8 * wing), (chord, 0.06, wing), SWAPPED, sweep)]
    if d.chance(0.4):
        wings.append(part("barrel", (x, -0.12, thick + wing), (0.12, 0.26, 0.12), ACCENT, lying))
    tail = d.uniform(0.2, 0.4)
    wings.append(part(kind, (-0.85 * long, 0.05, 0.3), (0.13, 0.05, 0.25), ACCENT))
    parts += _mirror(wings, 2)
    parts.append(
        part(d.pick(("box", "ellipsoid")), (-0.85 * long, tail, 0.0), (0.15, tail, 0.06), ACCENT)
    )
    nose = d.integer(0, 2)
    if nose == 0:
        parts.append(
            part("cylinder", (long, 0.0, 0.0), (0.45, 0.04, 0.45), ACCENT, lying, hole=0.75)
        )
    elif nose == 1:
        parts.append(
            part("cone", (long + 0.15, 0.0, 0.0), (0.9 * thick, 0.3, 0.9 * thick), ACCENT, lying)
        )
    cabin = d.uniform(0.14, 0.26)
    parts.append(part("ellipsoid", (d.uniform(0.2, 0.5), thick, 0.0), (0.26, cabin, 0.16), ACCENT))
    return parts


def _totem(d: Draw) -> list[Part]:
    parts, y = [], 0.0
    roles = (PATTERN, SWAPPED, PATTERN, ACCENT)
    levels = d.integer(3, 4)
    for level in range(levels):
        tall = d.uniform(0.18, 0.42)
        wide = d.uniform(0.28, 0.75) * (1.0 - 0.08 * level)
        last = level == levels - 1
        kind = d.pick(TOPS if last else (*BLOCKS, "waist", "cup", "frustum", "octahedron"))
        parts.append(part(kind, (0.0, y + tall, 0.0), (wide, tall, wide), roles[level]))
        y += 2 * tall - 0.03
    size, place = d.uniform(0.14, 0.28), d.uniform(0.3, 0.7) * y
    kind = d.pick(("ellipsoid", "box", "cone", "octahedron"))
    out = part(kind, (d.uniform(0.6, 0.75), place, 0.0), _even(size), ACCENT, turn(2, -90.0))
    return parts + _mirror([out], 0)


def _castle(d: Draw) -> list[Part]:
    wide, deep, tall = d.uniform(0.55, 0.8), d.uniform(0.4, 0.6), d.uniform(0.3, 0.5)
    parts = [part("box", (0.0, 0.0, 0.0), (wide, tall, deep))]
    if d.chance(0.6):
        high = d.uniform(0.2, 0.4)
        kind = d.pick(("roof", "pyramid", "dome"))
        parts.append(part(kind, (0.0, tall + high, 0.0), (0.8 * wide, high, deep), SWAPPED))
    tower, up = d.uniform(0.15, 0.24), d.uniform(0.1, 0.5)
    shaft, top = (
        d.pick(("cylinder", "hexagon", "box")),
        d.pick(("cone", "dome", "cup", "ellipsoid")),
    )
    cap = d.uniform(0.14, 0.3)
    corners = [
        part(shaft, (wide, 0.5 * up, deep), (tower, tall + 0.5 * up, tower), SWAPPED),
        part(top, (wide, tall + up + cap, deep), (1.25 * tower, cap, 1.25 * tower), ACCENT),
    ]
    if d.chance(0.5):
        corners = _mirror(corners, 2)
    parts += _mirror(corners, 0)
    parts.append(
        part("cylinder", (0.0, -0.2 * tall, deep), (0.2, 0.06, 0.26), ACCENT, turn(0, 90.0))
    )
    return parts


SHAPES: dict[str, Callable[[Draw], list[Part]]] = {
    "vessel": _vessel,
    "creature": _creature,
    "vehicle": _vehicle,
    "rocket": _rocket,
    "lamp": _lamp,
    "seat": _seat,
    "robot": _robot,
    "plane": _plane,
    "totem": _totem,
    "castle": _castle,
}


def draw_shape(draw: Draw, name: str) -> tuple[Part, ...]:
    """Draws a random shape of the named kind, centred, with longest side 2."""
    return normalise(SHAPES[name](draw))


def normalise(parts: list[Part]) -> tuple[Part, ...]:
    """Translates and scales parts: bounding box centred on the origin, longest side 2."""
    upright, sideways = IDENTITY, turn(1, 90.0)
    low, high = [0.0] * 3, [0.0] * 3
    front = [bounds(p, upright) for p in parts]
    side = [bounds(p, sideways) for p in parts]
    for axis, (boxes, place) in enumerate(((front, 0), (front, 1), (side, 0))):
        low[axis] = min(box[place] - box[place + 2] for box in boxes)
        high[axis] = max(box[place] + box[place + 2] for box in boxes)
    scale = 2.0 / max(h - b for h, b in zip(high, low, strict=True))
    middle = [0.5 * (h + b) for h, b in zip(high, low, strict=True)]
    return tuple(
        p._replace(
            centre=tuple((c - m) * scale for c, m in zip(p.centre, middle, strict=True)),
            scale=tuple(s * scale for s in p.scale),
        )
        for p in parts
    )
