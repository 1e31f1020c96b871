"""A folder of images as rows of a gallery."""

from collections.abc import Callable

import numpy as np

from afa.data.listing import Found, class_name
from afa.data.readable import SHOWN, reading_threads, why_not
from afa.data.types import Files, ImageSet
from afa.errors import UserError, printable
from afa.inference.load import Trained
from afa.retrieval.records import Records

CHUNK = 1024  # images that are described between two lines of progress

Note = Callable[[str], None]


def described(trained: Trained, found: Found, note: Note) -> Records:
    """Every image of a folder: its path within is its id, the folder it lies in its class.

    Args:
      trained: of a run.
      found: the images of the folder.
      note: is told of progress, and of images that cannot be read and are left out.

    Raises:
      UserError: no image in it can be read.
    """
    places = _readable(found, note)
    if not places:
        raise UserError(f"{found.root}: holds no images that can be read")
    every, names = found.paths, found.ids
    paths, ids = [every[i] for i in places], [names[i] for i in places]
    vectors = []
    for begin in range(0, len(paths), CHUNK):
        part = paths[begin : begin + CHUNK]
        count = len(part)
        images = ImageSet(
            Files(str(path) for path in part),
            np.zeros(count, np.int64),
            tuple(ids[begin : begin + count]),
            np.zeros(count, bool),
        )
        vectors.append(trained(images, "gallery"))
        note(f"described {begin + count} of {len(paths)} images")
    folders = [found.files[i][:-1] for i in places]
    classes = [class_name(parts[-1]) if parts else "" for parts in folders]
    absolute = [str(path.absolute()) for path in paths]
    return Records.of(np.concatenate(vectors), ids, classes, absolute)


def _readable(found: Found, note: Note) -> list[int]:
    """Places of the images that can be read."""
    reasons = why_not(found.paths, reading_threads())
    bad = [i for i, reason in enumerate(reasons) if reason]
    names = found.ids
    for i in bad[:SHOWN]:
        note(f"left out {printable(names[i])}: {reasons[i]}")
    if len(bad) > SHOWN:
        note(f"left out {len(bad)} images that cannot be read")
    return [i for i, reason in enumerate(reasons) if not reason]
