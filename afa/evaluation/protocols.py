"""Evaluation protocols: which images of a split are queries and which are the gallery."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from afa.data.types import ImageSet
from afa.errors import UserError

Index = Int64[np.ndarray, "_"]
NEEDS = {
    "query_gallery": "images that the data set calls queries and gallery",
    "catalogue": "catalogue images",
}


@dataclass(frozen=True)
class Protocol:
    """Queries and gallery as indices into an image set.

    Attributes:
      queries: image indices of the queries.
      gallery: image indices of the gallery.
      exclude: position of each query in the gallery, -1 if it is not in the gallery.
    """

    name: str
    queries: Index
    gallery: Index
    exclude: Index


def protocols(images: ImageSet, choice: str = "auto") -> list[Protocol]:
    """Returns the protocols that a split supports, the main one first.

    leave_one_out: every image that is not a catalogue image is searched among the others.
    query_gallery: the queries of the data set are searched in its gallery; it replaces
    leave_one_out if the data set has a gallery, unless `choice` is "leave_one_out".
    catalogue (single-view): every query is searched among the catalogue images, one per class.

    Args:
      images: the split.
      choice: name of one protocol, or "auto" for all.

    Raises:
      UserError: the split does not support the choice.
    """
    wild, catalogue = ~images.catalogue, np.flatnonzero(images.catalogue)
    queries, gallery = np.flatnonzero(wild), np.zeros(0, np.int64)
    if images.gallery is not None and choice != "leave_one_out":
        queries = np.flatnonzero(wild & ~images.gallery)
        gallery = np.flatnonzero(wild & images.gallery)
    not_in_gallery = np.full(len(queries), -1)
    found = {}
    if len(gallery):
        found["query_gallery"] = Protocol("query_gallery", queries, gallery, not_in_gallery)
    else:
        own = np.arange(len(queries))
        found["leave_one_out"] = Protocol("leave_one_out", queries, queries, own)
    if len(catalogue):
        found["catalogue"] = Protocol("catalogue", queries, catalogue, not_in_gallery)
    if choice == "auto":
        return list(found.values())
    if choice not in found:
        raise UserError(
            f"evaluation.protocol={choice!r} needs {NEEDS[choice]}, and the test classes have none"
        )
    return [found[choice]]


def halves(images: ImageSet, seed: int = 0) -> Protocol:
    """Splits every class in halves, without catalogue images: queries and gallery.

    Like leave-one-out it needs no queries and gallery of the data set, but no query is in the
    gallery, as methods that prepare the gallery require. A class with an odd number of images has
    one more in the gallery.

    Args:
      images: the split.
      seed: the same seed gives the same halves.
    """
    wild = np.flatnonzero(~images.catalogue)
    shuffled, position = _positions(images, wild, seed)
    queries, gallery = (np.sort(shuffled[position % 2 == half]) for half in (1, 0))
    return Protocol("halves", queries, gallery, np.full(len(queries), -1))


def drawn_evenly(images: ImageSet, index: Index, count: int, seed: int) -> Index:
    """Draws at most `count` images, spread evenly over the classes.

    Args:
      images: the image set.
      index: image indices to draw from.
      count: number of images; 0 for all.
      seed: the same seed gives the same draw.

    Returns:
      Image indices, ascending.
    """
    if count == 0 or count >= len(index):
        return index
    shuffled, position = _positions(images, index, seed)
    return np.sort(shuffled[np.argsort(position, kind="stable")[:count]])


def _positions(images: ImageSet, index: Index, seed: int) -> tuple[Index, Index]:
    """The images at `index` in random order, and the position of each within its class."""
    shuffled = np.random.default_rng(seed).permutation(index)
    labels = images.labels[shuffled]
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order], side="left")
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order)) - starts
    return shuffled, position
