"""The renderer: identical pixels on every machine, geometry, families of look-alikes."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest

from afa.data.synthetic.objects import FAMILY, STRIPED, cues, family, outline, view_frame
from afa.data.synthetic.render import render
from afa.data.synthetic.shapes import KINDS, SHAPES, draw_shape, part
from afa.data.synthetic.solids import (
    MISS,
    bounds,
    hit,
    normals,
    place,
    product,
    sincos,
    transpose,
    turn,
)
from afa.data.synthetic.textures import PATTERNS, Draw, draw_texture, paint, value_noise

GOLDEN = {
    (0, 0, 0, 48): "981871c808638430451e6431c971f5a030dbcc4b984eba6ac7fce9e01b45310b",
    (0, 5, 3, 48): "59dc2227c6d92cff28f949066f274f43f05e70a2a6dddf65b50e6dc83c6f2d01",
    (0, 121, 8, 33): "89cd8af2252b2e372be1d991b9fcc18d7aaa164cdd721a32a6b7d41801b21108",
    (1, 42, 20, 64): "412a8416b34be1e0862a47615d203e103e4e70863bf6b3cb3a77709a382cae88",
}
FRAME = product(turn(2, 11.0), product(turn(0, 25.0), turn(1, -40.0)))
HOLE = 0.6


@pytest.mark.parametrize("arguments", GOLDEN)
def test_pixels_are_the_same_on_every_machine(arguments):
    assert hashlib.sha256(render(*arguments).tobytes()).hexdigest() == GOLDEN[arguments]


def test_images_depend_on_every_argument():
    images = [render(*a) for a in ((0, 9, 1, 24), (1, 9, 1, 24), (0, 8, 1, 24), (0, 9, 2, 24))]
    assert len({p.tobytes() for p in images}) == len(images)


@pytest.mark.parametrize("size", [8, 31, 96])
def test_any_size(size):
    for view in (0, 1):
        image = render(0, 3, view, size)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8


def test_catalogue_views_have_a_plain_light_background():
    for o in range(0, 40, 7):
        image = render(0, o, 0, 48).astype(int)
        border = np.concatenate([image[0], image[:, 0]])
        assert border.min() > 225
        assert border.max() - border.min() < 25
        dark = np.argwhere(image.min(2) < 190)
        extent = (dark.max(0) - dark.min(0) + 1).max() / 48
        assert 0.6 <= extent <= 0.95


def test_rendering_imports_only_numpy():
    heavy = ("jax", "tensorflow_datasets", "cv2", "rich", "PIL")
    code = f"import sys, afa.data.synthetic.render; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- geometry -----------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [-725.5, -90.0, -45.0, 0.0, 12.3, 45.0, 135.0, 180.0, 333.0])
def test_sine_and_cosine(degrees):
    expected = (math.sin(math.radians(degrees)), math.cos(math.radians(degrees)))
    assert sincos(degrees) == pytest.approx(expected, abs=1e-13)


def inside(p, points):
    """Whether points (3, n) are in the solid, by its definition."""
    moved = points - np.array(p.centre)[:, None]
    x, y, z = (np.array(p.rotation).T @ moved) / np.array(p.scale)[:, None]
    if p.profile is None:
        return np.all([a * x + b * y + c * z <= d for a, b, c, d in p.planes], axis=0)
    q0, q1, q2 = p.profile
    across = x * x + z * z
    return (across <= q0 + y * (q1 + q2 * y)) & (np.abs(y) <= 1) & (across >= p.hole**2)


def placed(kind, hole=0.0):
    rotation = product(turn(2, 35.0), turn(0, -20.0))
    return part(kind, (0.1, -0.2, 0.15), (0.7, 0.5, 0.4), rotation=rotation, hole=hole)


@pytest.mark.parametrize("kind", [*KINDS, "tube"])
def test_first_intersection_agrees_with_ray_marching(kind):
    p = placed("cylinder", HOLE) if kind == "tube" else placed(kind)
    ramp = np.linspace(-1.2, 1.2, 25, dtype=np.float32)
    x, y = (g.ravel() for g in np.meshgrid(ramp, ramp))
    found = hit(p, FRAME, x, y)
    depths = np.linspace(1.5, -1.5, 1501)
    solid = np.zeros((len(depths), len(x)), bool)
    for row, depth in enumerate(depths):
        seen = np.stack([x, y, np.full_like(x, depth)]).astype(np.float64)
        solid[row] = inside(p, np.array(FRAME).T @ seen)
    marched = np.where(solid.any(0), depths[solid.argmax(0)], MISS)
    grazing = (found > MISS) != (marched > MISS)
    assert grazing.mean() < 0.01
    both = (found > MISS) & (marched > MISS)
    assert both.sum() > 30
    # A ray that grazes an edge may slip between two steps of the march.
    assert np.mean(np.abs(found[both] - marched[both]) > 0.004) < 0.01


@pytest.mark.parametrize("kind", [*KINDS, "tube"])
def test_normals_have_unit_length_and_face_the_viewer(kind):
    p = placed("cylinder", HOLE) if kind == "tube" else placed(kind)
    ramp = np.linspace(-1.2, 1.2, 60, dtype=np.float32)
    x, y = (g.ravel() for g in np.meshgrid(ramp, ramp))
    depth = hit(p, FRAME, x, y)
    met = depth > MISS
    points = np.stack(place(np.stack([x[met], y[met], depth[met]]), transpose(FRAME)))
    found = normals(p, points)
    np.testing.assert_allclose((found**2).sum(0), 1, atol=1e-4)
    towards = np.array(FRAME[2]) @ found
    assert np.mean(towards > -0.02) > 0.99
    # One step out along the normal is outside, one step in is inside.
    assert np.mean(inside(p, points + 0.004 * found)) < 0.01
    assert np.mean(inside(p, points - 0.004 * found)) > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_contain_the_part(kind):
    p = placed(kind)
    centre_x, centre_y, half_x, half_y = bounds(p, FRAME)
    ramp = np.linspace(-1.5, 1.5, 80, dtype=np.float32)
    x, y = (g.ravel() for g in np.meshgrid(ramp, ramp))
    met = hit(p, FRAME, x, y) > MISS
    assert np.abs(x[met] - centre_x).max() <= half_x + 1e-5
    assert np.abs(y[met] - centre_y).max() <= half_y + 1e-5


# ---- objects and textures -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_objects_are_centred_with_longest_side_2(name):
    for seed in range(4):
        parts = draw_shape(Draw(seed), name)
        assert 3 <= len(parts) <= 20
        left, right, low, high = outline(parts, view_frame(0.0, 0.0, 0.0))[1]
        assert 0.9 < max(right - left, high - low) < 2.1


def test_family_is_two_shapes_times_two_textures():
    ids = [cues(o) for o in range(2 * FAMILY)]
    assert ids[:4] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(set(ids)) == len(ids)
    for index in range(12):
        members = family(0, index)
        assert members.shapes[0] != members.shapes[1]
        assert (members.kinds[0] == members.kinds[1]) == (index % 2 == 0)
        one, two = members.textures
        assert (one.palette == two.palette) == (index % 4 < 2)
        assert (one.pattern == two.pattern) == (index % 4 >= 2)
        if one.palette == two.palette:
            assert not {one.pattern, two.pattern} <= set(STRIPED)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_shows_more_than_one_tone(pattern):
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (3, 4000)).astype(np.float32)
    texture = draw_texture(Draw(3), pattern)
    colours = paint(texture, points, 1)
    assert colours.shape == (3, 4000)
    assert colours.dtype == np.float32
    assert 0 <= colours.min() <= colours.max() <= 1
    assert colours.std(axis=1).max() > 0.05


def test_value_noise_is_smooth_and_between_0_and_1():
    line = np.zeros((3, 2000), np.float32)
    line[0] = np.linspace(-20, 20, 2000)
    noise = value_noise(line, 7)
    assert 0 <= noise.min() < 0.3 < 0.7 < noise.max() <= 1
    assert np.abs(np.diff(noise)).max() < 0.05
