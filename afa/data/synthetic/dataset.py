"""The synthetic data set: rendered once into array_record, then read from a cache.

The name of the cache folder contains everything the images depend on. A build writes to a temporary
folder, which is renamed when it is complete, and holds a file lock, which the system releases if
the process dies. An interrupted build is restarted. Concurrent runs wait for the lock.

Separate Python processes render the images and write them to pipes. They import NumPy alone.
Unlike `multiprocessing` workers they do not re-import the main program (which may be a notebook, or
use JAX), and they end when the reader of their pipe ends.
"""

import contextlib
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from afa.config import DataConfig
from afa.console import bar
from afa.data.splits import fold
from afa.data.synthetic.objects import FAMILY
from afa.data.synthetic.render import VERSION, render
from afa.data.types import Dataset, ImageSet, Joined, RawImage, fingerprint
from afa.errors import UserError
from afa.io import cache_home, expanded, locked, require_writable

SEED = 0
NAME = "synthetic_objects"
JPEG_QUALITY = 95
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.125  # of the families; the rest is for training
MIN_OBJECTS, MIN_VIEWS, MIN_SIZE = 3 * FAMILY, 2, 16
MAX_WORKERS = 16
_COMPLETE = "fingerprint.txt"  # written last
_LENGTH = struct.Struct("<I")  # length prefix of each image in a worker's pipe
_WORKER = (
    "import sys; from afa.data.synthetic.dataset import write_images; "
    "write_images(*map(int, sys.argv[1:]))"
)

Example = dict[str, Any]


def load_synthetic(config: DataConfig) -> Dataset:
    """Loads the synthetic data set; the first call builds it in the cache.

    Images are JPEG, read from array_record on access. Their ids are "object_0123/catalogue" and
    "object_0123/wild_07".

    Raises:
      UserError: a setting is out of range, or the build fails, for example on a full disk.
    """
    _check(config)
    folder = _folder(config)
    if not (folder / _COMPLETE).is_file():
        try:
            _build_once(config, folder)
        except (OSError, RuntimeError) as error:  # the array_record writer raises RuntimeError
            reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
            raise UserError(
                f"data.cache={str(folder.parent)!r}: the synthetic data set cannot be built there "
                f"({reason})"
            ) from error
    import tensorflow_datasets as tfds  # slow import

    builder: Any = tfds.builder_from_directory(folder)
    sets = {}
    for split, objects in split_objects(config.objects).items():
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        names = [image_id(o, v) for o in objects for v in range(config.views + 1)]
        first_views = np.arange(len(names)) % (config.views + 1) == 0
        labels = np.repeat(np.array(objects, np.int64), config.views + 1)
        sets[split] = ImageSet(_EncodedImages(source), labels, tuple(names), first_views)
    train, validation, test = sets["train"], sets["validation"], sets["test"]
    digest = (folder / _COMPLETE).read_text().strip()
    val_text, split = "the next", digest
    if config.folds:
        train, validation = _folded(train, validation, config)
        val_text = f"fold {config.fold} of {config.folds} with data.split_seed={config.split_seed},"
        split = fingerprint([(digest, config.fold, f"of {config.folds}", config.split_seed)])
    counts = [len(images.classes) for images in (train, validation, test)]
    return Dataset(
        name=config.name,
        train=train,
        validation=validation,
        test=test,
        class_names=tuple(f"object_{o:04d}" for o in range(config.objects)),
        protocol=(
            f"class-disjoint: {counts[0]} rendered objects train, {val_text} {counts[1]} validate, "
            f"the last {counts[2]} test; families of {FAMILY} look-alikes stay together"
        ),
        fingerprint=split,
        test_fingerprint=digest,
    )


def _folded(train: ImageSet, validation: ImageSet, config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Splits the training and validation objects into folds; families stay together."""
    pool = ImageSet(
        Joined([train.images, validation.images]),
        np.concatenate([train.labels, validation.labels]),
        train.ids + validation.ids,
        np.concatenate([train.catalogue, validation.catalogue]),
    )
    held_out = fold(len(pool.classes) // FAMILY, config, 1, "families of look-alikes")
    is_validation = np.isin(pool.labels // FAMILY, held_out)
    return pool.subset(np.flatnonzero(~is_validation)), pool.subset(np.flatnonzero(is_validation))


def split_objects(count: int) -> dict[str, range]:
    """Returns the objects of each split; families stay together.

    Families are drawn independently, so consecutive families can form a split.
    """
    families = count // FAMILY
    test = max(1, round(TEST_SHARE * families))
    validation = max(1, round(VALIDATION_SHARE * families))
    begin_validation = FAMILY * (families - test - validation)
    begin_test = FAMILY * (families - test)
    return {
        "train": range(begin_validation),
        "validation": range(begin_validation, begin_test),
        "test": range(begin_test, count),
    }


def image_id(object_index: int, view: int) -> str:
    """ "object_0123/catalogue" for view 0, else "object_0123/wild_07"."""
    kind = f"wild_{view:02d}" if view else "catalogue"
    return f"object_{object_index:04d}/{kind}"


class _EncodedImages(Sequence[RawImage]):
    """The encoded images of one split."""

    def __init__(self, source: Sequence[Example]) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.source[int(index)]["image"]


def _check(config: DataConfig) -> None:
    for field, least in (("objects", MIN_OBJECTS), ("views", MIN_VIEWS), ("render_size", MIN_SIZE)):
        value = getattr(config, field)
        if value < least:
            raise UserError(f"data.{field}={value} is too small (allowed: at least {least})")
    if config.objects % FAMILY:
        raise UserError(
            f"data.objects={config.objects} splits a family of look-alikes "
            f"(allowed: multiples of {FAMILY}; nearest: {FAMILY * round(config.objects / FAMILY)})"
        )


def _folder(config: DataConfig) -> Path:
    root = expanded("data.cache", config.cache) if config.cache else cache_home()
    key = f"v{VERSION}_seed{SEED}_{config.objects}x{config.views}_{config.render_size}px"
    return root / f"{NAME}_{key}"


# ---- building -----------------------------------------------------------------------------------


def _build_once(config: DataConfig, folder: Path) -> None:
    """Builds the data set, unless another process did while this one waited for the lock."""
    require_writable(folder.parent, "data.cache")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if (folder / _COMPLETE).is_file():
            return
        # Left by an interrupted build: a running one would hold the lock.
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            built, digest = _build(config, unfinished)
            (built / _COMPLETE).write_text(digest + "\n")
            built.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _build(config: DataConfig, folder: Path) -> tuple[Path, str]:
    """Renders all images into `folder`; returns the path of the data set and its fingerprint."""
    import tensorflow_datasets as tfds

    from afa.data.synthetic.builder import SyntheticObjects

    views, size = config.views, config.render_size
    rows: list[tuple[str, int, str, int]] = []
    total = config.objects * (views + 1)
    with bar("rendering the synthetic data set (once)", total) as advance:

        def examples(split: str) -> Iterator[Example]:
            for example in _examples(split_objects(config.objects)[split], views, size):
                rows.append((example["id"], example["label"], split, len(example["image"])))
                yield example
                advance()

        tfds.disable_progress_bar()  # this function has its own progress bar
        builder: Any = SyntheticObjects(folder, examples, config.objects)
        # Do not look for a copy in a bucket: a build never uses the network.
        offline = tfds.download.DownloadConfig(try_download_gcs=False)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints about downloading
            builder.download_and_prepare(download_config=offline)
    return Path(builder.data_dir), fingerprint([(f"v{VERSION}", SEED, "", size), *rows])


def _examples(objects: range, views: int, size: int) -> Iterator[Example]:
    images = render_parallel(objects, views, size)
    for object_index in objects:
        for view in range(views + 1):
            yield {
                "image": next(images),
                "label": object_index,
                "id": image_id(object_index, view),
                "catalogue": view == 0,
            }


# ---- rendering in several processes -------------------------------------------------------------


def render_parallel(objects: range, views: int, size: int) -> Iterator[bytes]:
    """Yields JPEG images of all views of the objects, in order, from one process per core.

    Raises:
      RuntimeError: a rendering process ended early.
    """
    total = len(objects) * (views + 1)
    count = min(MAX_WORKERS, os.cpu_count() or 1, total)
    workers = [
        _start(SEED, objects.start, total, views, size, first, count) for first in range(count)
    ]
    try:
        for number in range(total):
            yield _receive(workers[number % count])
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def write_images(
    seed: int, first_object: int, total: int, views: int, size: int, first: int, stride: int
) -> None:
    """Runs a rendering process: writes every `stride`-th of `total` images to standard output."""
    for each in (signal.SIGPIPE, signal.SIGINT):  # end without a traceback; the reader reports
        signal.signal(each, signal.SIG_DFL)
    for number in range(first, total, stride):
        object_index, view = divmod(number, views + 1)
        image = encode(render(seed, first_object + object_index, view, size))
        sys.stdout.buffer.write(_LENGTH.pack(len(image)) + image)
        sys.stdout.buffer.flush()


def encode(image: np.ndarray) -> bytes:
    """Encodes an image as JPEG without chroma subsampling, which would blur fine texture."""
    return simplejpeg.encode_jpeg(
        image, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444", fastdct=False
    )


def _start(*arguments: int) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, *map(str, arguments)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


def _receive(worker: subprocess.Popen[bytes]) -> bytes:
    assert worker.stdout is not None
    header = worker.stdout.read(_LENGTH.size)
    image = worker.stdout.read(_LENGTH.unpack(header)[0]) if len(header) == _LENGTH.size else b""
    if not image:
        raise RuntimeError(f"a rendering process ended early (code {worker.wait()})")
    return image
