"""Batches of an image set. A training batch is a pure function of (seed, step)."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypedDict, TypeVar, cast

import grain
import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from afa.config import DataConfig
from afa.data import corruptions, families
from afa.data.augment import ASPECT, augment
from afa.data.corruptions import CORRUPTIONS, SEVERITIES, Pixels, changed, corrupt
from afa.data.corruptions import Corruption as Function
from afa.data.families import FAMILIES
from afa.data.images import UnreadableImage, decode, evaluation_side, resize_crop
from afa.data.images import evaluation_view as evaluation_view_of
from afa.data.readable import reading_threads
from afa.data.types import ImageSet, RawImage
from afa.data.unseen import refuse_unseen
from afa.errors import UserError, choose

# Random streams: a different one for each use.
SAMPLE, VIEW = 0, 1

PREFETCH_PER_THREAD = 2  # batches prefetched per thread

Result = TypeVar("Result")
Corruption = tuple[str, int]  # name and severity


class Batch(TypedDict):
    """One process's part of a training batch.

    clean: augmented images. image: the same images, some of them transformed by `config.family` or
    corrupted. label: training class index. corruption: 0 for none, i + 1 for
    `config.corruptions[i]`. damage: the pixels that a local family or corruption has hidden.
    """

    clean: UInt8[np.ndarray, "b s s 3"]
    image: UInt8[np.ndarray, "b s s 3"]
    label: Int32[np.ndarray, "b"]
    corruption: Int32[np.ndarray, "b"]
    damage: Bool[np.ndarray, "b s s"]


class TrainPipeline:
    """Training batches of an image set.

    Attributes:
      steps_per_epoch: batches per epoch, rounded down.
      classes: class id of each training class index.
    """

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        small: tuple[int, int] = (0, 0),
        later: tuple[int, DataConfig] | None = None,
    ) -> None:
        """Checks that the sampler can fill batches from these images.

        Args:
          images: training images.
          process_index, process_count: this process and the number of processes.
          small: (steps, side): number of first steps with images of another side, in pixels.
          later: (step, settings): from this step on, batches are made by other settings.

        Raises:
          UserError: unknown corruption or family, or too few classes or images for the batch.
        """
        refuse_unseen("data.corruptions", config.corruptions)
        for name in config.corruptions:
            choose("data.corruptions", name, CORRUPTIONS)
        if config.family:
            choose("data.family", config.family, FAMILIES)
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
        # Shortest crop side, as a fraction of the image side: large JPEGs may be decoded smaller.
        self._least_side = math.sqrt(config.crop_scale / ASPECT)
        self._change, self._later = 0, None
        if later is not None:
            self._change = later[0]
            self._later = TrainPipeline(images, later[1], seed, process_index, process_count)

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
        """Returns the indices of the images in the global batch of `step` (from 0)."""
        if self._later is not None and step >= self._change:
            return self._later.indices(step)
        if self.config.sampler == "shuffle":
            epoch, position = divmod(step, self.steps_per_epoch)
            order = _permutation(self.seed, epoch, len(self.images))
            return order[position * self.config.batch_size :][: self.config.batch_size]
        per_class = self.config.images_per_class
        count = self.config.batch_size // per_class
        # Each epoch draws every class once, up to a remainder.
        epoch, position = divmod(step, len(self.classes) // count)
        chosen = _permutation(self.seed, epoch, len(self.classes))[position * count :][:count]
        rng = _generator(self.seed, SAMPLE, step)
        return np.concatenate(
            [np.resize(rng.permutation(self._members[c]), per_class) for c in chosen]
        ).astype(np.int64)

    def batch(self, step: int) -> Batch:
        """Returns this process's part of the batch of `step` (from 0).

        Raises:
          UserError: an image cannot be read.
        """
        if self._later is not None and step >= self._change:
            return self._later.batch(step)
        index = self.indices(step)[self._rows.start : self._rows.stop]
        size = self._small[1] if step < self._small[0] else self.config.image_size
        shape = (len(index), size, size, 3)
        clean, image = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        corruption = np.zeros(len(index), np.int32)
        damage = np.empty(shape[:-1], bool)
        for k, (row, i) in enumerate(zip(self._rows, index, strict=True)):
            rng = _generator(self.seed, VIEW, step, row)
            clean[k], image[k], damage[k], corruption[k] = self._views(int(i), size, rng)
        label = self._labels[index].astype(np.int32)
        return Batch(clean=clean, image=image, label=label, corruption=corruption, damage=damage)

    def _views(
        self, index: int, size: int, rng: np.random.Generator
    ) -> tuple[Pixels, Pixels, Bool[np.ndarray, "h w"], int]:
        """Returns a clean view of an image, its copy that may be transformed or corrupted, the
        damage of the copy, and the corruption."""
        config = self.config
        min_side = math.ceil(size / self._least_side) if self._least_side else 0
        pixels = _read(self.images, index, min_side)
        clean = augment(pixels, size, rng, config.crop_scale, config.flip, config.jitter)
        image, damage = clean, np.zeros(clean.shape[:-1], bool)
        if config.family and rng.random() < config.family_probability:
            image = FAMILIES[config.family](clean, rng)
            if config.family in families.LOCAL:
                damage |= changed(clean, image)
        if not config.corruptions or rng.random() >= config.corrupt_probability:
            return clean, image, damage, 0
        which = int(rng.integers(len(config.corruptions)))
        name, severity = config.corruptions[which], int(rng.choice(SEVERITIES))
        corrupted = corrupt(image, name, severity, rng)
        if name in corruptions.LOCAL:
            damage |= changed(image, corrupted)
        return clean, corrupted, damage, which + 1

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps `start` to `stop` - 1, prefetched by `data.read_threads`."""
        return _in_threads(self.batch, start, stop, reading_threads(self.config.read_threads))


def steps_per_epoch(images: ImageSet, config: DataConfig) -> int:
    """Returns the number of batches per epoch, rounded down, at least 1."""
    return max(1, len(images) // config.batch_size)


def eval_batches(
    images: ImageSet,
    config: DataConfig,
    batch_size: int,
    corruption: Corruption | Sequence[Corruption] | None = None,
    seed: int = 0,
) -> Iterator[UInt8[np.ndarray, "b s s 3"]]:
    """Yields the evaluation views of all images, in order; the last batch may be smaller.

    Args:
      corruption: (name, severity) applied to all views, or one per image, with the random
        numbers of `evaluated`.

    Raises:
      UserError: an image cannot be read, or the corruption is unknown.
    """
    each = cast(
        Sequence[Corruption] | None,
        [corruption] * len(images) if isinstance(corruption, tuple) else corruption,
    )
    for name, _ in each or ():
        choose("corruption", name, CORRUPTIONS)

    def view(index: int) -> UInt8[np.ndarray, "s s 3"]:
        return evaluated(images, index, config, None if each is None else each[index], seed)

    def batch(number: int) -> UInt8[np.ndarray, "b s s 3"]:
        begin = number * batch_size
        return np.stack([view(i) for i in range(begin, min(begin + batch_size, len(images)))])

    batches, threads = math.ceil(len(images) / batch_size), reading_threads(config.read_threads)
    return _in_threads(batch, 0, batches, threads)


def evaluated(
    images: ImageSet,
    index: int,
    config: DataConfig,
    corruption: Corruption | None = None,
    seed: int = 0,
    table: Mapping[str, Function] = CORRUPTIONS,
) -> UInt8[np.ndarray, "s s 3"]:
    """Returns the evaluation view of one image, corrupted or not.

    The random numbers depend on the seed, the image id and the corruption, so that an image is
    corrupted identically in any subset, order or process.

    Args:
      corruption: name in `table`, and severity.

    Raises:
      UserError: the image cannot be read, or the corruption is unknown.
    """
    side = evaluation_side(config.image_size, config.crop_fraction)
    pixels = resize_crop(_read(images, index, side), config.image_size, config.crop_fraction)
    if corruption is None:
        return pixels
    name, severity = corruption
    return corrupt(pixels, name, severity, _rng_for(seed, images.ids[index], name, severity), table)


def evaluation_view(image: RawImage, config: DataConfig) -> UInt8[np.ndarray, "s s 3"]:
    """Decodes, resizes and crops an image as in evaluation and search.

    Raises:
      UnreadableImage: the image cannot be decoded.
    """
    return evaluation_view_of(image, config.image_size, config.crop_fraction)


def preprocessing(config: DataConfig) -> dict[str, int | float | str]:
    """Returns the preprocessing that an image needs before it is embedded; stored with an index."""
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


def _rng_for(*key: int | str) -> np.random.Generator:
    """Returns a random generator seeded by any printable values, the same in every process."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return _generator(*np.frombuffer(digest, "<u4").tolist())


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "count"]:
    """Returns the random order of an epoch, cached because every step of the epoch uses it."""
    order = _rng_for("epoch", seed, epoch).permutation(count)
    order.setflags(write=False)
    return order


def _in_threads(
    function: Callable[[int], Result], start: int, stop: int, threads: int
) -> Iterator[Result]:
    """Yields `function(i)` for i from `start` to `stop` - 1, in order, prefetched by threads."""
    if start >= stop:
        return iter(())
    options = grain.ReadOptions(threads, PREFETCH_PER_THREAD * threads)
    numbers = grain.MapDataset.range(start, stop)
    return iter(numbers.map(function).to_iter_dataset(options))
