"""From an image set to batches. A training batch is a pure function of (seed, step)."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, TypeVar, cast

import grain
import numpy as np
from jaxtyping import Int32, Int64, UInt8

from afa.config import DataConfig
from afa.data.augment import ASPECT, augment
from afa.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from afa.data.images import UnreadableImage, decode, evaluation_side, resize_crop
from afa.data.images import evaluation_view as evaluation_view_of
from afa.data.readable import reading_threads
from afa.data.types import ImageSet, RawImage
from afa.errors import UserError, choose

# Streams of random numbers, so that no two uses share one.
SAMPLE, VIEW = 0, 1

PREFETCH_PER_THREAD = 2  # batches waiting for the training step

Result = TypeVar("Result")
Corruption = tuple[str, int]  # name and severity


class Batch(TypedDict):
    """One process's share of a training batch.

    clean: augmented images. image: the same, some of them corrupted. label: index among the
    training classes. corruption: 0 for none, i + 1 for `config.corruptions[i]`.
    """

    clean: UInt8[np.ndarray, "b s s 3"]
    image: UInt8[np.ndarray, "b s s 3"]
    label: Int32[np.ndarray, "b"]
    corruption: Int32[np.ndarray, "b"]


class TrainPipeline:
    """Training batches of an image set.

    Attributes:
      steps_per_epoch: batches in which about as many images are seen as the set has.
      classes: class id of each training label.
    """

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        small: tuple[int, int] = (0, 0),
    ) -> None:
        """Checks that the sampler can do its work with these images.

        Args:
          small: (steps, side): the first steps have images of another side, in pixels.

        Raises:
          UserError: an unknown corruption, or too few classes or images for the batch.
        """
        for name in config.corruptions:
            choose("data.corruptions", name, CORRUPTIONS)
        if config.batch_size % process_count:
            raise UserError(
                f"data.batch_size={config.batch_size} cannot be divided among {process_count} "
                "processes"
            )
        self.images, self.config, self.seed, self._small = images, config, seed, small
        self.classes, self._labels = np.unique(images.labels, return_inverse=True)
        order = np.argsort(self._labels, kind="stable")
        starts = np.searchsorted(self._labels[order], np.arange(1, len(self.classes)))
        self._members = np.split(order, starts)
        self._check_sampler()
        self.steps_per_epoch = steps_per_epoch(images, config)
        rows = config.batch_size // process_count
        self._rows = range(process_index * rows, (process_index + 1) * rows)
        # A crop keeps at least this share of a side, so a large JPEG may be decoded smaller.
        self._kept = math.sqrt(config.crop_scale / ASPECT)

    def _check_sampler(self) -> None:
        size, per_class = self.config.batch_size, self.config.images_per_class
        if self.config.sampler == "shuffle":
            if len(self.images) < size:
                raise UserError(
                    f"data.batch_size={size} is more than the {len(self.images)} training images"
                )
            return
        if size % per_class:
            raise UserError(
                f"data.batch_size={size} must be a multiple of data.images_per_class={per_class}"
            )
        if size // per_class > len(self.classes):
            raise UserError(
                f"data.batch_size={size} with data.images_per_class={per_class} needs "
                f"{size // per_class} training classes, and there are {len(self.classes)}: use a "
                f"batch of at most {len(self.classes) * per_class}"
            )
        for members in self._members:
            if len(members) < 2:
                raise UserError(
                    f"the training class of {self.images.ids[members[0]]!r} has 1 image, and "
                    "data.sampler='pk' needs 2 in every class: remove the class, or use 'shuffle'"
                )

    def indices(self, step: int) -> Int64[np.ndarray, "batch"]:
        """Images of the global batch of `step` (from 0), as indices into the image set."""
        if self.config.sampler == "shuffle":
            epoch, place = divmod(step, self.steps_per_epoch)
            order = _permutation(self.seed, epoch, len(self.images))
            return order[place * self.config.batch_size :][: self.config.batch_size]
        per_class = self.config.images_per_class
        count = self.config.batch_size // per_class
        # Classes go round: each is drawn once before any is drawn again, up to a remainder.
        epoch, place = divmod(step, len(self.classes) // count)
        chosen = _permutation(self.seed, epoch, len(self.classes))[place * count :][:count]
        rng = _generator(self.seed, SAMPLE, step)
        return np.concatenate(
            [np.resize(rng.permutation(self._members[c]), per_class) for c in chosen]
        ).astype(np.int64)

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of `step` (from 0); depends on nothing else.

        Raises:
          UserError: an image cannot be read, named by its path.
        """
        index = self.indices(step)[self._rows.start : self._rows.stop]
        size = self._small[1] if step < self._small[0] else self.config.image_size
        shape = (len(index), size, size, 3)
        clean, image = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        corruption = np.zeros(len(index), np.int32)
        for place, (row, i) in enumerate(zip(self._rows, index, strict=True)):
            rng = _generator(self.seed, VIEW, step, row)
            clean[place], image[place], corruption[place] = self._views(int(i), size, rng)
        label = self._labels[index].astype(np.int32)
        return Batch(clean=clean, image=image, label=label, corruption=corruption)

    def _views(
        self, index: int, size: int, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s 3"], int]:
        """A clean view of an image, the view to learn from, and what spoiled the latter."""
        config = self.config
        min_side = math.ceil(size / self._kept) if self._kept else 0
        pixels = _read(self.images, index, min_side)
        clean = augment(pixels, size, rng, config.crop_scale, config.flip, config.jitter)
        if not config.corruptions or rng.random() >= config.corrupt_probability:
            return clean, clean, 0
        which = int(rng.integers(len(config.corruptions)))
        severity = int(rng.choice(SEVERITIES))
        return clean, corrupt(clean, config.corruptions[which], severity, rng), which + 1

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` - 1, read ahead by `data.read_threads` threads."""
        return _in_threads(self.batch, start, stop, reading_threads(self.config.read_threads))


def steps_per_epoch(images: ImageSet, config: DataConfig) -> int:
    """Batches in which about as many images are seen as the set has."""
    return max(1, len(images) // config.batch_size)


def eval_batches(
    images: ImageSet,
    config: DataConfig,
    batch_size: int,
    corruption: Corruption | Sequence[Corruption] | None = None,
    seed: int = 0,
) -> Iterator[UInt8[np.ndarray, "b s s 3"]]:
    """The evaluation view of every image, in order; the last batch may be short.

    Args:
      corruption: (name, severity) applied to the views; a list has one an image. Its random
        numbers come from the seed, the image's id and the corruption, so an image looks the
        same in any subset or order.

    Raises:
      UserError: an image cannot be read, or there is no such corruption.
    """
    each = cast(
        Sequence[Corruption] | None,
        [corruption] * len(images) if isinstance(corruption, tuple) else corruption,
    )
    for name, _ in each or ():
        choose("corruption", name, CORRUPTIONS)

    def view(index: int) -> UInt8[np.ndarray, "s s 3"]:
        side = evaluation_side(config.image_size, config.crop_fraction)
        pixels = resize_crop(_read(images, index, side), config.image_size, config.crop_fraction)
        if each is None:
            return pixels
        name, severity = each[index]
        return corrupt(pixels, name, severity, _keyed(seed, images.ids[index], name, severity))

    def batch(number: int) -> UInt8[np.ndarray, "b s s 3"]:
        begin = number * batch_size
        return np.stack([view(i) for i in range(begin, min(begin + batch_size, len(images)))])

    batches, threads = math.ceil(len(images) / batch_size), reading_threads(config.read_threads)
    return _in_threads(batch, 0, batches, threads)


def evaluation_view(image: RawImage, config: DataConfig) -> UInt8[np.ndarray, "s s 3"]:
    """What the networks see of an image at evaluation and search.

    Raises:
      UnreadableImage: it cannot be decoded.
    """
    return evaluation_view_of(image, config.image_size, config.crop_fraction)


def preprocessing(config: DataConfig) -> dict[str, int | float | str]:
    """What whoever embeds a new image has to do to it; stored with an index."""
    return {
        "image_size": config.image_size,
        "crop_fraction": config.crop_fraction,
        "resize": "shorter side, area average down, bilinear up; then centre crop",
        "colour": "RGB",
        "layout": "NHWC",
        "dtype": "uint8, 0 to 255",
    }


def _read(images: ImageSet, index: int, min_side: int) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return decode(images.images[index], min_side)
    except (OSError, UnreadableImage) as error:
        raise UserError(f"{images.path(index)}: cannot be read ({error})") from None


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _keyed(*key: int | str) -> np.random.Generator:
    """A generator for a key of any printable parts, the same in every process and run."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return _generator(*np.frombuffer(digest, "<u4").tolist())


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "count"]:
    """A random order for an epoch, kept because every step of the epoch asks for it."""
    order = _keyed("epoch", seed, epoch).permutation(count)
    order.setflags(write=False)
    return order


def _in_threads(
    function: Callable[[int], Result], start: int, stop: int, threads: int
) -> Iterator[Result]:
    """`function` of every number from `start` to `stop` - 1, in order, computed ahead."""
    if start >= stop:
        return iter(())
    options = grain.ReadOptions(threads, PREFETCH_PER_THREAD * threads)
    numbers = grain.MapDataset.range(start, stop)
    return iter(numbers.map(function).to_iter_dataset(options))
