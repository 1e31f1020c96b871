"""Protocols: which images of a split are queries, and among which each is searched."""

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
      exclude: for each query its own place in the gallery, -1 when it is not there.
    """

    name: str
    queries: Index
    gallery: Index
    exclude: Index


def protocols(images: ImageSet, choice: str = "auto") -> list[Protocol]:
    """The protocols a split allows, the headline first.

    leave_one_out: every in-the-wild image is searched among the others. query_gallery: the
    queries of the data set are searched among its gallery; this takes the place of the former where
    the data set tells them apart, unless the former is asked for. catalogue (single-view): every
    query is searched among the catalogue images, one a class.

    Raises:
      UserError: the split does not allow the choice.
    """
    wild, catalogue = ~images.catalogue, np.flatnonzero(images.catalogue)
    queries, gallery = np.flatnonzero(wild), np.zeros(0, np.int64)
    if images.gallery is not None and choice != "leave_one_out":
        queries = np.flatnonzero(wild & ~images.gallery)
        gallery = np.flatnonzero(wild & images.gallery)
    nowhere = np.full(len(queries), -1)
    found = {}
    if len(gallery):
        found["query_gallery"] = Protocol("query_gallery", queries, gallery, nowhere)
    else:
        own = np.arange(len(queries))
        found["leave_one_out"] = Protocol("leave_one_out", queries, queries, own)
    if len(catalogue):
        found["catalogue"] = Protocol("catalogue", queries, catalogue, nowhere)
    if choice == "auto":
        return list(found.values())
    if choice not in found:
        raise UserError(
            f"evaluation.protocol={choice!r} needs {NEEDS[choice]}, and the test classes have none"
        )
    return [found[choice]]


def halves(images: ImageSet, seed: int = 0) -> Protocol:
    """One half of every class's in-the-wild images searched among the other halves.

    As leave-one-out it needs no queries and gallery of the data set, but no query is in the
    gallery: for methods that prepare the gallery. The draw is the same for the same seed. A
    class of an odd number of images has one more in the gallery.
    """
    wild = np.flatnonzero(~images.catalogue)
    shuffled, place = _places(images, wild, seed)
    queries, gallery = (np.sort(shuffled[place % 2 == half]) for half in (1, 0))
    return Protocol("halves", queries, gallery, np.full(len(queries), -1))


def drawn_evenly(images: ImageSet, index: Index, count: int, seed: int) -> Index:
    """At most `count` of the images at `index` (0: all), spread evenly over the classes.

    The draw is the same for the same seed, and ascending.
    """
    if count == 0 or count >= len(index):
        return index
    shuffled, place = _places(images, index, seed)
    return np.sort(shuffled[np.argsort(place, kind="stable")[:count]])


def _places(images: ImageSet, index: Index, seed: int) -> tuple[Index, Index]:
    """The images at `index` in a random order, and the place of each within its class."""
    shuffled = np.random.default_rng(seed).permutation(index)
    labels = images.labels[shuffled]
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order], side="left")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - starts
    return shuffled, place
