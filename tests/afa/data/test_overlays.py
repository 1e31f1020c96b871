"""Overlays and fills: which part of an image they hide, and by what."""

from typing import Any

import cv2
import numpy as np
import pytest

from afa.data.families.fills import fills
from afa.data.families.overlays import layer, overlays, regions

SHAPES = [(16, 16), (64, 40), (20, 90), (224, 224)]


def drawn(shape, seed):
    """Hidden pixels, opacity and cover of one overlay."""
    opacity, cover = layer(shape[0], shape[1], np.random.default_rng(seed))
    assert opacity.shape == (*shape, 1) and cover.shape == (*shape, 3)
    assert opacity.min() >= 0 and opacity.max() <= 1
    return opacity[..., 0] > 0, opacity[..., 0], cover


def soft(opacity):
    """Whether an overlay has more than one opacity."""
    return np.ptp(opacity[opacity > 0]) > 1e-3


def hard(shape, seeds):
    """Hidden pixels, opacity and cover of overlays with hard edges."""
    return [each for each in (drawn(shape, seed) for seed in seeds) if not soft(each[1])]


def image(shape):
    return np.random.default_rng(5).integers(0, 256, (*shape, 3), np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_hides_three_to_fifty_per_cent(shape):
    count = 24 if shape == (224, 224) else 80
    shares = [hidden.mean() for hidden, _, _ in hard(shape, range(count))]
    one = 1 / np.prod(shape)
    assert len(shares) > count / 4
    assert min(shares) >= 0.03 - one and max(shares) <= 0.5 + one
    assert np.std(shares) > 0.08  # not all the same


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_has_one_to_three_layers(shape):
    """Each over those before it; intact pixels keep their values."""
    given, counts = image(shape), set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        number = int(rng.integers(1, 4))
        counts.add(number)
        expected, intact = given.astype(float), np.ones(shape, bool)
        for _ in range(number):
            opacity, cover = layer(shape[0], shape[1], rng)
            expected = opacity * cover + (1 - opacity) * expected
            intact &= opacity[..., 0] == 0
        found = overlays(given, np.random.default_rng(seed))
        assert np.abs(found - expected).max() < 1.6  # rounded after every layer
        np.testing.assert_array_equal(found[intact], given[intact])
    assert counts == {1, 2, 3}
    np.testing.assert_array_equal(given, image(shape))


def test_opacity():
    """Three in five are opaque, the others between 0.4 and 1."""
    found = np.array([opacity.max() for _, opacity, _ in hard((32, 32), range(400))])
    opaque = found > 0.999
    assert 0.5 < opaque.mean() < 0.7
    assert 0.39 < found.min() < 0.45 and 0.93 < found[~opaque].max() < 1
    assert abs(found[~opaque].mean() - 0.7) < 0.06


def test_half_of_the_edges_are_soft():
    """The smoothing grows with the image, and keeps the mean opacity."""
    found = [drawn((64, 64), seed) for seed in range(200)]
    shares = [soft(opacity) for _, opacity, _ in found]
    assert 0.4 < np.mean(shares) < 0.6
    reach = {}
    for side in (64, 192):
        edges = []
        for seed in range(60):
            _, opacity, _ = drawn((side, side), seed)
            if soft(opacity):
                between = (opacity > 0.05 * opacity.max()) & (opacity < 0.95 * opacity.max())
                steps = np.abs(np.diff(opacity > 0.5 * opacity.max(), axis=1)).sum()
                edges.append(between.sum() / max(steps, 1))
        reach[side] = np.median(edges)
    assert 2 < reach[192] / reach[64] < 5


def pieces(mask: Any) -> int:
    """Number of connected components, with the background."""
    return cv2.connectedComponents(np.asarray(mask, np.uint8))[0]


def test_regions_have_every_shape():
    """From one large region to many small ones, wide and narrow; no two alike."""
    masks = [regions(64, 64, np.random.default_rng(seed))[0] for seed in range(60)]
    assert len({mask.tobytes() for mask in masks}) == 60
    counts = [pieces(mask) - 1 for mask in masks]
    assert min(counts) <= 3 and max(counts) >= 60
    # Bands: the largest disc that fits into them is small for the area.
    stored = (np.asarray(mask, np.uint8) for mask in masks)
    radius = [cv2.distanceTransform(each, cv2.DIST_L2, 5).max() for each in stored]
    large = [r for r, count in zip(radius, counts, strict=True) if count <= 10]
    assert min(large) < 6 < 12 < max(large)
    # Edges are as often upright as level.
    steps = np.array([[np.diff(mask.astype(int), axis=a).any(1 - a).sum() for a in (0, 1)]
                      for mask in masks])  # fmt: skip
    assert 0.8 < np.mean(steps[:, 0] / steps[:, 1]) < 1.3


def test_covers_are_a_colour_a_patchwork_or_a_texture():
    colours = [len(np.unique(drawn((48, 48), seed)[2].reshape(-1, 3), axis=0))
               for seed in range(150)]  # fmt: skip
    kinds = [np.mean([low <= n <= high for n in colours])
             for low, high in ((1, 1), (2, 4), (5, 48**2))]  # fmt: skip
    assert all(0.2 < share < 0.5 for share in kinds), kinds


def test_regions_grow_with_the_image():
    """The hidden picture of a large image is that of a small one, but for its noise."""

    def components(side):
        return np.median([pieces(regions(side, side, np.random.default_rng(seed))[0])
                          for seed in range(30)])  # fmt: skip

    assert 0.4 < components(64) / components(192) < 2.5


# ---- fills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_half_of_the_fills_are_overlays(shape):
    """The others replace regions of the same kind by means of the rest, or grey."""
    given, filled = image(shape), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = fills(given, np.random.default_rng(seed))
        if rng.random() >= 0.5:
            np.testing.assert_array_equal(found, overlays(given, rng))
            continue
        filled += 1
        height, width = shape
        hidden, _ = regions(height, width, rng)
        np.testing.assert_array_equal(found[~hidden], given[~hidden])
        # Of noise, means of several pixels vary less than the pixels.
        assert found[hidden].std() < 0.8 * given[hidden].std()
    assert 5 <= filled <= 15


def test_a_fill_continues_its_surroundings():
    """Of a picture whose halves have two colours, each keeps its own, away from the border."""
    given = np.full((64, 64, 3), (120, 60, 90), np.uint8)
    given[:, 32:] = (140, 200, 160)
    errors = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        if rng.random() >= 0.5:
            continue
        hidden, grain = regions(64, 64, rng)
        if hidden.mean() > 0.2 or grain > 3:
            continue
        found = fills(given, np.random.default_rng(seed)).astype(int)
        away = np.abs(np.arange(64) - 31.5) > 12
        errors.append(np.abs(found - given)[:, away][hidden[:, away]].mean())
    assert len(errors) > 4 and np.mean(errors) < 5
