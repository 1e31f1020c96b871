"""Damage: the pixels of a training image that a local family or corruption has hidden."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from afa.config import DataConfig
from afa.data import corruptions, families
from afa.data.images import encode_jpeg
from afa.data.pipeline import TrainPipeline
from afa.data.types import ImageSet

PLAIN = DataConfig(
    image_size=32, batch_size=8, sampler="shuffle", corruptions=(), corrupt_probability=1.0,
    family_probability=1.0, read_threads=1,
)  # fmt: skip


def pipeline(seed=0, **changes):
    draw = np.random.default_rng(0)
    images = [encode_jpeg(draw.integers(0, 256, (40, 48, 3), np.uint8)) for _ in range(24)]
    ids = tuple(f"image-{i}" for i in range(24))
    made = ImageSet(images, np.arange(24) // 2, ids, np.zeros(24, bool))
    return TrainPipeline(made, dataclasses.replace(PLAIN, **changes), seed)


def batches(count: int = 3, **changes: Any):
    """Some batches as one."""
    made = pipeline(**changes)
    found = [made.batch(step) for step in range(count)]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def beyond(one, other, levels=8):
    """Pixels of which a channel differs by more than eight grey levels."""
    return (np.abs(one.astype(int) - other.astype(int)) > levels).any(-1)


def test_what_counts_as_a_change():
    before = np.full((1, 5, 3), 100, np.uint8)
    after = before.copy()
    after[0, :, 1] = (100, 108, 109, 92, 91)
    np.testing.assert_array_equal(
        corruptions.changed(before, after), [[False, False, True, False, True]]
    )
    extreme = np.stack([np.zeros((2, 3), np.uint8), np.full((2, 3), 255, np.uint8)])
    assert corruptions.changed(extreme, extreme[::-1].copy()).all()


@pytest.mark.parametrize("family", families.LOCAL)
def test_damage_of_a_family(family):
    found = batches(family=family)
    np.testing.assert_array_equal(found["damage"], beyond(found["image"], found["clean"]))
    # The rest is untouched, but for the faint end of soft edges.
    assert (found["image"][~found["damage"]] == found["clean"][~found["damage"]]).mean() > 0.85
    share = found["damage"].mean((1, 2))
    assert share.min() > 0.01 and share.max() < 0.95


@pytest.mark.parametrize("name", corruptions.LOCAL)
def test_damage_of_a_corruption(name):
    found = batches(corruptions=(name,))
    np.testing.assert_array_equal(found["damage"], beyond(found["image"], found["clean"]))
    assert found["damage"].any((1, 2)).all() and not found["damage"].all((1, 2)).any()


@pytest.mark.parametrize("name", sorted(set(corruptions.CORRUPTIONS) - set(corruptions.LOCAL)))
def test_a_corruption_of_the_whole_image_is_no_damage(name):
    found = batches(1, corruptions=(name,))
    # The mildest low resolution is that of so small an image.
    assert (found["image"] != found["clean"]).any((1, 2, 3)).mean() > 0.8
    assert not found["damage"].any()


@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) - set(families.LOCAL)))
def test_a_family_of_whole_images_is_no_damage(family):
    found = batches(1, family=family)
    assert (found["image"] != found["clean"]).any((1, 2, 3)).all()
    assert not found["damage"].any()


def test_damage_is_found_before_later_corruptions():
    """The same pixels, blurred or not."""
    before = batches(family="overlays")
    after = batches(family="overlays", corruptions=("gaussian_blur",))
    np.testing.assert_array_equal(after["damage"], before["damage"])
    assert (after["corruption"] == 1).all()
    assert beyond(after["image"], after["clean"])[~after["damage"]].any()


def test_damage_is_that_of_both():
    """An occlusion hides more of an image with overlays, and no more than it changes."""
    overlays = batches(family="overlays")
    both = batches(family="overlays", corruptions=("occlusion",))
    np.testing.assert_array_equal(
        both["damage"], overlays["damage"] | beyond(both["image"], overlays["image"])
    )
    assert (both["damage"].sum((1, 2)) > overlays["damage"].sum((1, 2))).all()
    # Of an image that a family has changed as a whole, only the occluded part is damaged.
    changed = batches(family="random_convolution")
    occluded = batches(family="random_convolution", corruptions=("occlusion",))
    np.testing.assert_array_equal(occluded["damage"], beyond(occluded["image"], changed["image"]))


def test_damage_depends_on_seed_and_step():
    chosen = {"family": "overlays", "corruptions": ("occlusion", "gaussian_noise")}
    one, again = (pipeline(seed=4, **chosen).batch(3)["damage"] for _ in range(2))
    np.testing.assert_array_equal(one, again)
    for other in (pipeline(seed=4, **chosen).batch(2), pipeline(seed=5, **chosen).batch(3)):
        assert (other["damage"] != one).any()


def test_images_as_they_are_have_no_damage():
    never: dict[str, Any] = {"family_probability": 0.0, "corrupt_probability": 0.0}
    found = batches(family="overlays", corruptions=("occlusion",), **never)
    np.testing.assert_array_equal(found["image"], found["clean"])
    assert not found["damage"].any()
    half = batches(10, family="overlays", family_probability=0.5)
    assert 0.3 < half["damage"].any((1, 2)).mean() < 0.7
