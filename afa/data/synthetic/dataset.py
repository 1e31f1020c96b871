"""The synthetic data set: rendered once into array_record, then read from its cache.

The cache folder is named by everything its images depend on. It appears under that name only
when it is complete: a build works in a folder beside it and renames that at the end, holding a lock
that the system drops when the process dies, so a killed build is started again and of two runs that
start together one waits for the other.

Images are rendered by separate interpreters that import NumPy and no more, and write to a pipe.
Unlike workers of `multiprocessing` they do not import the main program again (which may be a
notebook, or hold JAX), and they end when the reader of their pipe does.
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
from afa.data.splits import fold
from afa.data.synthetic.objects import FAMILY
from afa.data.synthetic.render import VERSION, render
from afa.data.types import Dataset, ImageSet, Joined, RawImage, fingerprint
from afa.errors import UserError
from afa.io import cache_home, expanded, locked, require_writable

SEED = 0
NAME = "synthetic_objects"
JPEG_QUALITY = 95
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.125  # of the families; the rest train
MIN_OBJECTS, MIN_VIEWS, MIN_SIZE = 3 * FAMILY, 2, 16
MAX_WORKERS = 16
_COMPLETE = "fingerprint.txt"  # written last
_LENGTH = struct.Struct("<I")  # before each image in a worker's pipe
_WORKER = (
    "import sys; from afa.data.synthetic.dataset import write_images; "
    "write_images(*map(int, sys.argv[1:]))"
)

Example = dict[str, Any]


def load_synthetic(config: DataConfig) -> Dataset:
    """The synthetic data set, built in the cache the first time it is asked for.

    Images are JPEG, read from array_record when indexed. Their ids are
    "object_0123/catalogue" and "object_0123/wild_07".

    Raises:
      UserError: a setting out of range, or the build fails (a full disk, say).
    """
    _check(config)
    folder = _folder(config)
    if not (folder / _COMPLETE).is_file():
        try:
            _build_once(config, folder)
        except (OSError, RuntimeError) as error:  # the array_record writer raises the latter
            reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
            raise UserError(
                f"data.cache={str(folder.parent)!r}: the synthetic data set cannot be built there "
                f"({reason})"
            ) from error
    import tensorflow_datasets as tfds  # takes a second: only who needs it waits

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
    how, split = "the next", digest
    if config.folds:
        train, validation = _folded(train, validation, config)
        how = f"fold {config.fold} of {config.folds} with data.split_seed={config.split_seed},"
        split = fingerprint([(digest, config.fold, f"of {config.folds}", config.split_seed)])
    counts = [len(images.classes) for images in (train, validation, test)]
    return Dataset(
        name=config.name,
        train=train,
        validation=validation,
        test=test,
        class_names=tuple(f"object_{o:04d}" for o in range(config.objects)),
        protocol=(
            f"class-disjoint: {counts[0]} rendered objects train, {how} {counts[1]} validate, "
            f"the last {counts[2]} test; families of {FAMILY} look-alikes stay together"
        ),
        fingerprint=split,
        test_fingerprint=digest,
    )


def _folded(train: ImageSet, validation: ImageSet, config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Both splits shared out anew among the folds, by whole families."""
    pool = ImageSet(
        Joined([train.images, validation.images]),
        np.concatenate([train.labels, validation.labels]),
        train.ids + validation.ids,
        np.concatenate([train.catalogue, validation.catalogue]),
    )
    drawn = fold(len(pool.classes) // FAMILY, config, 1, "families of look-alikes")
    chosen = np.isin(pool.labels // FAMILY, drawn)
    return pool.subset(np.flatnonzero(~chosen)), pool.subset(np.flatnonzero(chosen))


def split_objects(count: int) -> dict[str, range]:
    """Objects of each split; no family is in two splits.

    Families are drawn independently of each other, so consecutive ones are as good as any.
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
            raise UserError(f"data.{field}={value} is too small (allowed: {least} and more)")
    if config.objects % FAMILY:
        raise UserError(
            f"data.objects={config.objects} cuts a family of look-alikes "
            f"(allowed: multiples of {FAMILY}; nearest: {FAMILY * round(config.objects / FAMILY)})"
        )


def _folder(config: DataConfig) -> Path:
    root = expanded("data.cache", config.cache) if config.cache else cache_home()
    key = f"v{VERSION}_seed{SEED}_{config.objects}x{config.views}_{config.render_size}px"
    return root / f"{NAME}_{key}"


# ---- building -----------------------------------------------------------------------------------


def _build_once(config: DataConfig, folder: Path) -> None:
    """Builds the set, unless another process has done so while this one waited for the lock."""
    require_writable(folder.parent, "data.cache")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if (folder / _COMPLETE).is_file():
            return
        # Whoever left these is dead: it would hold the lock.
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
    """Renders everything under `folder`; returns where the data set lies and its fingerprint."""
    import tensorflow_datasets as tfds
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from afa.data.synthetic.builder import SyntheticObjects

    views, size = config.views, config.render_size
    rows: list[tuple[str, int, str, int]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(
            "rendering the synthetic data set (once)", total=config.objects * (views + 1)
        )

        def examples(split: str) -> Iterator[Example]:
            for example in _examples(split_objects(config.objects)[split], views, size):
                rows.append((example["id"], example["label"], split, len(example["image"])))
                yield example
                progress.advance(bar)

        tfds.disable_progress_bar()  # one bar is enough
        builder: Any = SyntheticObjects(folder, examples, config.objects)
        # Looks for no copy in a bucket: a build never touches the network.
        offline = tfds.download.DownloadConfig(try_download_gcs=False)
        with contextlib.redirect_stdout(io.StringIO()):  # it would speak of downloading
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
    """JPEG images of all views of the objects, in order, from one process a core.

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
    """A rendering process: every `stride`-th of `total` images to standard output."""
    for silent in (signal.SIGPIPE, signal.SIGINT):  # the reader is gone, or tells the user itself
        signal.signal(silent, signal.SIG_DFL)
    for number in range(first, total, stride):
        object_index, view = divmod(number, views + 1)
        image = encode(render(seed, first_object + object_index, view, size))
        sys.stdout.buffer.write(_LENGTH.pack(len(image)) + image)
        sys.stdout.buffer.flush()


def encode(image: np.ndarray) -> bytes:
    """The JPEG stored for an image: full colour resolution, so that fine texture survives."""
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
