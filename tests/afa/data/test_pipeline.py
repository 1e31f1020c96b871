"""Batches are pure in (seed, step) and split over processes; properties of the samplers."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from afa.config import DataConfig
from afa.data.augment import augment, colour_matrix, crop_box
from afa.data.corruptions import corrupt
from afa.data.images import encode_jpeg
from afa.data.pipeline import TrainPipeline, eval_batches, evaluation_view, preprocessing
from afa.data.readable import reading_threads
from afa.data.types import ImageSet
from afa.errors import UserError

CONFIG = DataConfig(image_size=16, batch_size=8, images_per_class=2, read_threads=2)


def image_set(per_class=(5, 4, 3, 6, 2), first_class=10):
    """Class c has `per_class[c]` noisy JPEG images; class ids do not begin at 0."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(per_class)), per_class) + first_class
    images = [encode_jpeg(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in labels]
    ids = tuple(f"c{label}/p{i}" for i, label in enumerate(labels))
    return ImageSet(images, labels, ids, np.zeros(len(labels), bool))


def equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def test_batch_shapes_and_types():
    batch: dict[str, Any] = {**TrainPipeline(image_set(), CONFIG, seed=0).batch(0)}
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "clean": ((8, 16, 16, 3), "uint8"),
        "image": ((8, 16, 16, 3), "uint8"),
        "label": ((8,), "int32"),
        "corruption": ((8,), "int32"),
        "damage": ((8, 16, 16), "bool"),
    }


@pytest.mark.parametrize("sampler", ["pk", "shuffle"])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetching_does_not_change_the_batches(sampler, threads):
    config = dataclasses.replace(CONFIG, sampler=sampler, read_threads=threads)
    pipeline = TrainPipeline(image_set(), config, seed=3)
    steps = list(pipeline.iterate(2, 9))
    assert len(steps) == 7
    for step, batch in enumerate(steps, start=2):
        equal(batch, TrainPipeline(image_set(), config, seed=3).batch(step))
    assert list(pipeline.iterate(4, 4)) == []


def test_later_steps_may_have_other_settings():
    """Such as those of G and D: another size, more corruptions, no classes."""
    later = dataclasses.replace(CONFIG, sampler="shuffle", batch_size=4, corrupt_probability=1.0)
    both = TrainPipeline(image_set(), CONFIG, seed=3, later=(2, later))
    first, second = TrainPipeline(image_set(), CONFIG, seed=3), TrainPipeline(image_set(), later, 3)
    found = list(both.iterate(0, 5))
    for step, batch in enumerate(found):
        equal(batch, (first if step < 2 else second).batch(step))
        np.testing.assert_array_equal(
            both.indices(step), (first if step < 2 else second).indices(step)
        )
    assert [len(batch["label"]) for batch in found] == [8, 8, 4, 4, 4]
    assert all((batch["corruption"] > 0).all() for batch in found[2:])
    np.testing.assert_array_equal(both.classes, first.classes)


def test_one_thread_per_core_unless_requested(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(5)), raising=False)
    assert (reading_threads(), reading_threads(3), reading_threads(40)) == (5, 3, 40)
    assert DataConfig().read_threads == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(96)))
    assert reading_threads() == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert reading_threads() == 7


@pytest.mark.parametrize("sampler", ["pk", "shuffle"])
def test_processes_split_one_global_batch(sampler):
    config = dataclasses.replace(CONFIG, sampler=sampler)
    batch = TrainPipeline(image_set(), config, seed=1).batch(5)
    parts = [TrainPipeline(image_set(), config, 1, i, 4).batch(5) for i in range(4)]
    equal(batch, {key: np.concatenate([part[key] for part in parts]) for key in batch})


def test_batches_depend_on_seed_and_step():
    batches = [TrainPipeline(image_set(), CONFIG, seed).batch(step) for seed, step in ((0, 0),) * 2]
    equal(*batches)
    for seed, step in ((0, 1), (1, 0)):
        other = TrainPipeline(image_set(), CONFIG, seed).batch(step)
        assert (other["image"] != batches[0]["image"]).any()


def test_pk_samples_distinct_classes_and_images():
    pipeline = TrainPipeline(image_set(), CONFIG, seed=0)
    seen = set()
    for step in range(20):
        index = pipeline.indices(step)
        labels, counts = np.unique(pipeline.images.labels[index], return_counts=True)
        assert counts.tolist() == [2] * 4
        assert len(set(index.tolist())) == 8
        seen |= set(labels.tolist())
    assert seen == {10, 11, 12, 13, 14}


def test_pk_repeats_the_images_of_a_small_class_evenly():
    config = dataclasses.replace(CONFIG, batch_size=10, images_per_class=5)
    pipeline = TrainPipeline(image_set((2, 9)), config, seed=0)
    index = pipeline.indices(0)
    small = index[index < 2]
    assert sorted(np.bincount(small).tolist()) == [2, 3]
    assert len(set(index[index >= 2].tolist())) == 5


def test_shuffle_uses_each_image_at_most_once_per_epoch():
    config = dataclasses.replace(CONFIG, sampler="shuffle")
    pipeline = TrainPipeline(image_set(), config, seed=0)
    assert pipeline.steps_per_epoch == 2
    epochs = [[pipeline.indices(2 * e + s).tolist() for s in range(2)] for e in range(3)]
    for epoch in epochs:
        assert len({*epoch[0], *epoch[1]}) == 16
    assert epochs[0] != epochs[1]


def test_labels_and_corruptions_match_the_images():
    config = dataclasses.replace(CONFIG, corruptions=("contrast", "salt_pepper"))
    pipeline = TrainPipeline(image_set(), config, seed=0)
    kinds = []
    for step in range(12):
        batch = pipeline.batch(step)
        classes = pipeline.classes[batch["label"]]
        np.testing.assert_array_equal(classes, pipeline.images.labels[pipeline.indices(step)])
        changed = (batch["clean"] != batch["image"]).any((1, 2, 3))
        np.testing.assert_array_equal(changed, batch["corruption"] > 0)
        kinds += batch["corruption"].tolist()
    share = np.bincount(kinds) / len(kinds)
    assert len(share) == 3
    assert 0.3 < share[0] < 0.7


def test_no_corruption_without_names_or_with_probability_zero():
    for change in ({"corruptions": ()}, {"corrupt_probability": 0.0}):
        batch = TrainPipeline(image_set(), dataclasses.replace(CONFIG, **change), seed=0).batch(0)
        np.testing.assert_array_equal(batch["clean"], batch["image"])
        assert not batch["corruption"].any()


@pytest.mark.parametrize(
    ("per_class", "change", "message"),
    [
        ((4, 4), {}, "data.batch_size=8 with data.images_per_class=2 needs 4 training classes, and "
         "there are 2: use a batch of at most 4"),
        ((4, 4, 4, 1), {}, "the training class of 'c13/p12' has 1 image, and data.sampler='pk' "
         "needs 2 in every class: remove the class, or use 'shuffle'"),
        ((4, 4), {"images_per_class": 3},
         "data.batch_size=8 must be a multiple of data.images_per_class=3"),
        ((3, 4), {"sampler": "shuffle"}, "data.batch_size=8 is more than the 7 training images"),
        ((4,) * 4, {"corruptions": ("jpg",)}, "data.corruptions='jpg' is unknown; did you mean "
         "'jpeg'? (allowed: clutter, contrast, gaussian_blur, gaussian_noise, jpeg, "
         "low_resolution, motion_blur, occlusion, salt_pepper, stripes)"),
    ],
)  # fmt: skip
def test_impossible_settings_are_errors(per_class, change, message):
    with pytest.raises(UserError) as error:
        TrainPipeline(image_set(per_class), dataclasses.replace(CONFIG, **change), seed=0)
    assert str(error.value) == message


def test_batch_size_not_divisible_by_processes_is_an_error():
    with pytest.raises(UserError, match=r"data\.batch_size=8 cannot be divided among 3 processes"):
        TrainPipeline(image_set(), CONFIG, 0, 0, 3)


def test_image_damaged_after_loading_is_an_error():
    damaged = image_set((2, 2, 2, 2))
    broken = ImageSet([b"nothing"] * 8, damaged.labels, damaged.ids, damaged.catalogue)
    with pytest.raises(UserError, match=r"c1\d/p\d: cannot be read \(not an image of a known for"):
        list(TrainPipeline(broken, CONFIG, 0).iterate(0, 1))


def test_evaluation_views_are_in_order():
    images = image_set()
    batches = list(eval_batches(images, CONFIG, 6))
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    expected = np.stack([evaluation_view(image, CONFIG) for image in images.images])
    np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_corrupted_query_is_the_same_in_any_subset():
    images = image_set()
    all_views = np.concatenate(list(eval_batches(images, CONFIG, 7, ("occlusion", 3), seed=4)))
    index = np.array([11, 3, 8])
    part = np.concatenate(list(eval_batches(images.subset(index), CONFIG, 2, ("occlusion", 3), 4)))
    np.testing.assert_array_equal(part, all_views[index])
    other = np.concatenate(list(eval_batches(images, CONFIG, 7, ("occlusion", 3), seed=5)))
    assert (other != all_views).any()


def test_unknown_corruption_in_evaluation_is_an_error():
    with pytest.raises(UserError, match="corruption='fog' is unknown"):
        eval_batches(image_set(), CONFIG, 4, ("fog", 1))


def test_preprocessing_record_has_all_settings_of_the_view():
    stored = preprocessing(dataclasses.replace(CONFIG, crop_fraction=0.875))
    assert stored["image_size"] == 16
    assert stored["crop_fraction"] == 0.875
    assert stored["colour"] == "RGB"


def test_crops_are_inside_the_image_with_at_least_crop_scale():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 60, 2).tolist()
        area, aspect, down, across = rng.random(4).tolist()
        top, left, high, wide = crop_box((height, width, 3), area, aspect, down, across, 0.5)
        assert 0 <= top <= top + high <= height
        assert 0 <= left <= left + wide <= width
        assert high >= 1
        assert wide >= 1
    areas = [crop_box((300, 300, 3), u, 0.5, 0.0, 0.0, 0.5) for u in (0.0, 0.999)]
    assert [round(h * w / 300**2, 1) for _, _, h, w in areas] == [0.5, 1.0]


def test_augment_without_changes_is_the_identity():
    image = np.random.default_rng(1).integers(0, 256, (12, 12, 3), dtype=np.uint8)

    class Half(np.random.Generator):
        """Draws 0.5 everywhere: no stretch, no flip, no colour change."""

        def random(self, *args: Any, **kwargs: Any) -> Any:
            return np.full(args, 0.5)

    out = augment(image, 12, Half(np.random.PCG64(0)), 1.0, True, 0.4)
    np.testing.assert_array_equal(out, image)


def test_colour_matrix_against_its_definition():
    rgb = np.array([100.0, 150.0, 50.0])
    grey = rgb @ [0.299, 0.587, 0.114]
    saturated = grey + 1.3 * (rgb - grey)
    expected = 1.1 * (80 + 0.7 * (saturated - 80))
    matrix = colour_matrix(1.1, 0.7, 1.3, 80.0)
    np.testing.assert_allclose(matrix[:, :3] @ rgb + matrix[:, 3], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["gaussian_noise", "gaussian_blur", "motion_blur", "clutter"])
def test_corruptions_are_thread_safe(name):
    image = np.random.default_rng(2).integers(0, 256, (96, 96, 3), dtype=np.uint8)

    def run(seed):
        return corrupt(image, name, 5, np.random.default_rng(seed % 3))

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(24)))
    for seed, result in enumerate(results):
        np.testing.assert_array_equal(result, results[seed % 3])
