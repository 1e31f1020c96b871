"""Embeds a folder of images as rows of a gallery."""

from collections.abc import Callable

import numpy as np

from afa.data.listing import Found, class_name
from afa.data.readable import SHOWN, reading_threads, why_not
from afa.data.types import Files, ImageSet
from afa.errors import UserError, printable
from afa.inference.load import TrainedEmbedder
from afa.retrieval.records import Records

CHUNK = 1024  # images that are embedded between two lines of progress

Note = Callable[[str], None]


def embed_folder(embedder: TrainedEmbedder, found: Found, note: Note) -> Records:
    """Embeds every image of a folder.

    The id of an image is its path within the folder; its class is the name of its subfolder.

    Args:
      embedder: networks of a run.
      found: the images of the folder.
      note: receives lines of progress, and the images that are skipped because they cannot be
        read.

    Raises:
      UserError: no image can be read.
    """
    readable = _readable(found, note)
    if not readable:
        raise UserError(f"{found.root}: contains no images that can be read")
    all_paths, all_ids = found.paths, found.ids
    paths, ids = [all_paths[i] for i in readable], [all_ids[i] for i in readable]
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
        vectors.append(embedder(images, "gallery"))
        note(f"embedded {begin + count} of {len(paths)} images")
    folders = [found.files[i][:-1] for i in readable]
    classes = [class_name(parts[-1]) if parts else "" for parts in folders]
    absolute = [str(path.absolute()) for path in paths]
    return Records.of(np.concatenate(vectors), ids, classes, absolute)


def _readable(found: Found, note: Note) -> list[int]:
    """Indices of the images that can be read."""
    reasons = why_not(found.paths, reading_threads())
    bad = [i for i, reason in enumerate(reasons) if reason]
    names = found.ids
    for i in bad[:SHOWN]:
        note(f"skipped {printable(names[i])}: {reasons[i]}")
    if len(bad) > SHOWN:
        note(f"skipped {len(bad)} images that cannot be read")
    return [i for i, reason in enumerate(reasons) if not reason]
