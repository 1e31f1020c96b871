"""What each unseen corruption does to an image, and that no training can use one.

Their general tests (pure, harder with severity, any size) are in `test_corruptions`.
"""

import dataclasses

import cv2
import numpy as np
import pytest

from afa.config import DataConfig
from afa.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from afa.data.images import resize
from afa.data.pipeline import TrainPipeline, eval_batches
from afa.data.types import ImageSet
from afa.data.unseen import BLUE_SIGMA, CUT_SHARE, GREY, PLASMA_SIGMA, UNSEEN, refuse_unseen
from afa.errors import UserError


def applied(image, name, severity=3, seed=0):
    return corrupt(image, name, severity, np.random.default_rng(seed), UNSEEN)


def plain(tone, side=64):
    return np.full((side, side, 3), tone, np.uint8)


def photo(side=64):
    """Smooth colours with an edge, without black or white."""
    noise = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), side / 16).astype(float)
    image = 128 + 3 * (smooth - smooth.mean())
    image[:, side // 2 :] += 40
    return np.clip(image, 20, 235).astype(np.uint8)


def images(count=8, side=16):
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]
    labels = np.arange(count) // 2
    return ImageSet(pixels, labels, tuple(map(str, range(count))), np.zeros(count, bool))


def psnr(clean, image):
    return 10 * np.log10(255**2 / np.mean(np.square(np.subtract(clean, image, dtype=float))))


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("side", [16, 64, 224])
def test_psnr_falls_with_severity_and_is_comparable_at_any_size(name, side):
    clean = photo(side)
    mean = [
        np.mean([psnr(clean, applied(clean, name, severity, seed)) for seed in range(12)])
        for severity in SEVERITIES
    ]
    assert (np.diff(mean) < 0).all(), mean
    assert 10 < mean[2] < 32, mean


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("tone", [0, 90, 255])
def test_grey_and_constant_images(name, tone):
    out = applied(plain(tone), name, 5)
    assert out.dtype == np.uint8 and out.shape == (64, 64, 3)
    unchanged = (name, tone) in {("sparkles", 255), ("caustic_refraction", 0)}
    assert (out == tone).all() == unchanged
    coloured = (out.max(axis=2) != out.min(axis=2)).any()
    assert not coloured or name in ("plasma_noise", "sparkles")


def test_blue_noise_is_high_frequency_of_the_given_deviation():
    noise = applied(plain(128), "blue_noise", 2).astype(float)[..., 0] - 128
    assert abs(noise.std() - BLUE_SIGMA[1]) < 0.5
    power = np.abs(np.fft.fft2(noise)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    low, high = power[frequency < 0.1].mean(), power[frequency > 0.3].mean()
    assert low < high / 20
    coarse = resize(applied(plain(128), "blue_noise", 2), 8, 8).astype(float) - 128
    assert coarse.std() < 0.6  # white noise would keep an eighth of its deviation, 1.3


def test_plasma_noise_is_coloured_low_frequency_around_the_mean():
    noise = applied(plain(128), "plasma_noise", 1).astype(float) - 128
    assert abs(noise.std() - PLASMA_SIGMA[0]) < 1 and abs(noise.mean()) < 0.5
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.9
    power = np.abs(np.fft.fft2(noise, axes=(0, 1))) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64, 1 / 64), np.fft.fftfreq(64, 1 / 64)))
    octaves = [power[(frequency >= f) & (frequency < 2 * f)].mean() for f in (1, 2, 4, 8, 16)]
    assert (np.diff(np.log(octaves)) < -0.7).all()  # an octave halves the amplitude or more


@pytest.mark.parametrize("severity", SEVERITIES)
def test_the_checkerboard_cuts_the_given_share_and_leaves_the_rest(severity):
    clean = photo(128)
    clean[clean == GREY] += 1
    shares = []
    for seed in range(20):
        out = applied(clean, "checkerboard_cutout", severity, seed)
        cut = (out == GREY).all(axis=2)
        np.testing.assert_array_equal(out[~cut], clean[~cut])
        shares.append(cut.mean())
    assert abs(np.mean(shares) - CUT_SHARE[severity - 1]) < 0.03


def test_refraction_bends_a_line_and_changes_the_light():
    lines = plain(60)
    lines[:, 30:34] = 180
    out = applied(lines, "caustic_refraction", 3)
    places = [np.argmax(row) for row in cv2.GaussianBlur(out[..., 0], (0, 0), 1)]
    assert np.ptp(places) >= 2
    light = applied(plain(100), "caustic_refraction", 3)[..., 0]
    assert light.min() < 85 and light.max() > 120
    large = resize(applied(plain(100, 192), "caustic_refraction", 3), 64, 64)[..., 0]
    assert np.abs(large.astype(float) - light).mean() < 3  # the same water at any size


def test_sparkles_only_add_light_and_more_of_it_with_more_stars():
    clean = photo()
    out = [applied(clean, "sparkles", severity).astype(int) for severity in SEVERITIES]
    assert all((each >= clean).all() for each in out)
    assert (out[0] == 255).any()
    whole = [np.mean([applied(plain(0, side), "sparkles", 3, s).mean() for s in range(20)])
             for side in (16, 64, 192)]  # fmt: skip
    assert max(whole) < 1.3 * min(whole), whole


def test_training_refuses_unseen_corruptions_and_says_why():
    config = DataConfig(image_size=16, batch_size=4, images_per_class=2)
    config = dataclasses.replace(config, corruptions=("gaussian_blur", "sparkles"))
    with pytest.raises(UserError) as error:
        TrainPipeline(images(), config, seed=0)
    told = str(error.value)
    assert told.startswith("data.corruptions='sparkles' is an unseen corruption, which no training")
    assert all(name in told for name in CORRUPTIONS)


def test_the_evaluation_of_a_run_does_not_know_them():
    assert not set(UNSEEN) & set(CORRUPTIONS)
    with pytest.raises(UserError, match="'sparkles' is unknown"):
        eval_batches(images(), DataConfig(image_size=16), 4, ("sparkles", 3))
    refuse_unseen("data.corruptions", CORRUPTIONS)
