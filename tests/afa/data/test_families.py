"""Families of random transforms for training."""

import dataclasses

import numpy as np
import pytest
from scipy.special import ndtri

from afa.config import DataConfig, ExperimentConfig, generator_data, with_changes
from afa.data.families import FAMILIES, augmix, mixing, noise, prime, random_convolution
from afa.data.pipeline import TrainPipeline
from afa.data.types import ImageSet
from afa.errors import UserError

RAMP = np.repeat(np.arange(64, 192, 2, dtype=np.uint8), 64).reshape(64, 64, 1).repeat(3, axis=2)


def image(height=32, width=48):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_depend_on_the_generator_alone(name):
    family, given = FAMILIES[name], image()
    one, again = (family(given, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(given, image())  # unchanged
    assert one.dtype == np.uint8 and one.shape == given.shape
    drawn = [family(given, np.random.default_rng(i)).tobytes() for i in range(20)]
    assert len(set(drawn)) == 20


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(16, 16), (64, 40)])
def test_flat_and_small_images(name, shape):
    for level in (0, 128, 255):
        flat = np.full((*shape, 3), level, np.uint8)
        for seed in range(10):
            assert FAMILIES[name](flat, np.random.default_rng(seed)).shape == flat.shape


def test_a_mixture_is_convex():
    """Of transforms that change nothing it is the image; else it lies between."""
    x = image().astype(np.float32)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        np.testing.assert_allclose(mixing.mixed(x, [lambda a, _: a], rng), x, rtol=1e-5)
        between = mixing.mixed(x, [lambda a, _: np.zeros_like(a)], np.random.default_rng(seed))
        share = between.sum() / x.sum()
        assert 0 <= share <= 1
        np.testing.assert_allclose(between, share * x, rtol=1e-4, atol=1e-3)


def test_tones_of_augmix():
    ramp, rng = RAMP.astype(np.float32), np.random.default_rng(0)
    stretched = augmix.autocontrast(ramp, rng)
    np.testing.assert_allclose((stretched.min(), stretched.max()), (0, 255), atol=1e-3)
    assert len(np.unique(augmix.posterise(ramp, rng))) <= 128 / 16 + 1
    equalised = augmix.equalise(ramp, rng)
    np.testing.assert_allclose(np.diff(np.unique(equalised)), 255 / 63, atol=1)
    bright = np.full((8, 8, 3), 254, np.float32)
    assert (augmix.solarise(bright, rng) == 1).all()
    dark = np.full((8, 8, 3), 100, np.float32)
    assert (augmix.solarise(dark, rng) == 100).all()


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "shift_x", "shift_y"])
def test_positions_of_augmix(name):
    """At severity 3 of 10, a bright square moves and stays within a tenth of the side."""
    square = np.zeros((64, 64, 3), np.float32)
    square[28:36, 28:36] = 255
    for seed in range(10):
        moved = getattr(augmix, name)(square, np.random.default_rng(seed))
        y, x = np.argwhere(moved[..., 0] > 127).mean(axis=0)
        assert np.hypot(y - 31.5, x - 31.5) <= 64 / 10 + 4
        assert not np.array_equal(moved, square)


def test_a_colour_map_is_a_function_of_the_level():
    for seed in range(10):
        out = prime.recoloured(RAMP.astype(np.float32), np.random.default_rng(seed))
        assert (out == out[:, :1]).all()
        assert out.min() >= 0 and out.max() <= 255


def test_a_filter_without_noise_is_the_identity(monkeypatch):
    monkeypatch.setattr(prime, "FILTER_SIGMA", 0.0)
    x = image().astype(np.float32)
    np.testing.assert_allclose(prime.filtered(x, np.random.default_rng(0)), x)


def test_a_deformation_moves_no_border_and_has_no_folds():
    """Of the picture of x positions it shows where every pixel comes from."""
    x = np.arange(64, dtype=np.float32)
    positions = np.broadcast_to(x[None, :, None], (64, 64, 3)).copy()
    moved = []
    for seed in range(20):
        out = prime.deformed(positions, np.random.default_rng(seed))[..., 0]
        np.testing.assert_allclose(out[[0, -1]], positions[[0, -1], :, 0], atol=1e-3)
        np.testing.assert_allclose(out[:, [0, -1]], positions[:, [0, -1], 0], atol=1e-3)
        moved.append(np.sqrt(np.mean(np.square(out - positions[..., 0]))))
    assert 0.1 < np.mean(moved) < 6


def test_a_random_convolution_keeps_the_mean():
    flat = np.full((16, 16, 3), (10, 128, 200), np.uint8)
    for seed in range(5):
        out = random_convolution.random_convolution(flat, np.random.default_rng(seed))
        np.testing.assert_array_equal(out, flat)
    textured = image()
    drawn = [random_convolution.random_convolution(textured, np.random.default_rng(i))
             for i in range(40)]  # fmt: skip
    difference = [np.abs(each.astype(float) - textured).mean() for each in drawn]
    assert np.mean(difference) > 20


def test_the_strength_of_the_noise():
    """At 224 pixels its deviation is uniform up to 0.5 (Gaussian) or 0.6 (speckle) of the level.

    The share of the values that are not clipped tells the deviation.
    """
    grey = np.full((224, 224, 3), 128, np.uint8)
    found = {"gaussian": [], "speckle": []}
    for seed in range(80):
        pixels = noise.noise(grey, np.random.default_rng(seed))
        low, high = np.mean(pixels == 0), np.mean(pixels == 255)
        sigma = 0.5 / ndtri(1 - max((low + high) / 2, 1e-9))
        is_speckle = np.random.default_rng(seed).random() < 0.5
        found["speckle" if is_speckle else "gaussian"].append(sigma * (2 if is_speckle else 1))
    assert 0.4 < max(found["gaussian"]) < 0.52
    assert 0.5 < max(found["speckle"]) < 0.63
    assert min(map(len, found.values())) > 20


def images(count=8):
    pictures = [np.full((32, 32, 3), 20 * i + 40, np.uint8) for i in range(count)]
    ids = tuple(f"image-{i}" for i in range(count))
    return ImageSet(pictures, np.arange(count) // 2, ids, np.zeros(count, bool))


def test_batches_of_a_family():
    plain = DataConfig(image_size=32, batch_size=4, sampler="shuffle", corrupt_probability=0.0)
    chosen = dataclasses.replace(plain, family="noise", family_probability=1.0)
    without, with_family = (TrainPipeline(images(), each, seed=0) for each in (plain, chosen))
    before, after = without.batch(0), with_family.batch(0)
    np.testing.assert_array_equal(before["clean"], after["clean"])
    np.testing.assert_array_equal(before["image"], before["clean"])
    assert all((a != b).any() for a, b in zip(after["image"], after["clean"], strict=True))
    assert not after["corruption"].any()
    half = dataclasses.replace(chosen, family_probability=0.5)
    batches = [TrainPipeline(images(), half, seed=0).batch(i) for i in range(40)]
    changed = [(a != b).any() for each in batches
               for a, b in zip(each["image"], each["clean"], strict=True)]  # fmt: skip
    assert 0.35 < np.mean(changed) < 0.65


def test_generator_and_discriminator_have_a_family_of_their_own():
    chosen = {"data.family": "prime", "data.family_probability": 0.2}
    config = with_changes(ExperimentConfig(), **chosen)
    assert generator_data(config).family == ""
    own = {"generator.family": "noise", "generator.family_probability": 0.75}
    data = generator_data(with_changes(config, **own))
    assert (data.family, data.family_probability) == ("noise", 0.75)
    assert (config.data.family, config.data.family_probability) == ("prime", 0.2)


def test_an_unknown_family():
    wrong = DataConfig(image_size=32, batch_size=4, sampler="shuffle", family="augmx")
    with pytest.raises(UserError, match=r"data.family='augmx'.*did you mean 'augmix'"):
        TrainPipeline(images(), wrong, seed=0)
