"""Evaluation protocols: which images of a split are queries and which are the gallery."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from afa.data.types import ImageSet
from afa.errors import UserError, choose

Index = Int64[np.ndarray, "_"]


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

    @property
    def supported(self) -> bool:
        """Whether there is something to search for, and something to search in."""
        return bool(len(self.queries) and len(self.gallery))


@dataclass(frozen=True)
class Rule:
    """How a protocol divides a split.

    Attributes:
      divide: image set -> image indices of queries and of gallery; the split supports the
        protocol if neither is empty.
      needs: what a split must have, for the error.
    """

    divide: Callable[[ImageSet], tuple[Index, Index]]
    needs: str


def leave_one_out(images: ImageSet) -> tuple[Index, Index]:
    """Every image that is not a catalogue image is searched among the others."""
    wild = np.flatnonzero(~images.catalogue)
    return wild, wild


def query_gallery(images: ImageSet) -> tuple[Index, Index]:
    """The queries of the data set are searched in its gallery."""
    if images.gallery is None:
        return leave_one_out(images)[0], np.zeros(0, np.int64)
    wild = ~images.catalogue
    return np.flatnonzero(wild & ~images.gallery), np.flatnonzero(wild & images.gallery)


def catalogue(images: ImageSet) -> tuple[Index, Index]:
    """Single-view: the queries of the data set are searched among the catalogue images, of which
    every class has one."""
    return query_gallery(images)[0], np.flatnonzero(images.catalogue)


def halves(images: ImageSet) -> tuple[Index, Index]:
    """Every class is divided at random, without catalogue images. No query is in the gallery, as
    methods that prepare the gallery require. Of an odd number the gallery has one more."""
    shuffled, position = _positions(images, np.flatnonzero(~images.catalogue), seed=0)
    queries, gallery = (np.sort(shuffled[position % 2 == half]) for half in (1, 0))
    return queries, gallery


# The first that a split supports is its main protocol.
PROTOCOLS = {
    "query_gallery": Rule(query_gallery, "images that the data set calls queries and gallery"),
    "leave_one_out": Rule(leave_one_out, "images"),
    "halves": Rule(halves, "images"),
    "catalogue": Rule(catalogue, "catalogue images"),
}


def protocols(
    images: ImageSet, choice: str = "auto", field: str = "evaluation.protocol"
) -> list[Protocol]:
    """Returns the protocols to evaluate with.

    Args:
      images: the split.
      choice: name of one protocol, or "auto": the main protocol of the split, and all others that
        it supports with the same queries.
      field: name of the setting, for errors.

    Raises:
      UserError: the name is unknown, or the split does not support the protocol.
    """
    if choice == "auto":
        main, *others = supported(images) or [_divided("leave_one_out", images)]
        return [main, *(one for one in others if np.array_equal(one.queries, main.queries))]
    rule = choose(field, choice, {"auto": None, **PROTOCOLS})
    assert rule is not None
    found = _divided(choice, images)
    if not found.supported:
        raise UserError(f"{field}={choice!r} needs {rule.needs}, and the test classes have none")
    return [found]


def supported(images: ImageSet) -> list[Protocol]:
    """Returns all protocols that a split supports, the main one first."""
    found = [_divided(name, images) for name in PROTOCOLS]
    return [one for one in found if one.supported]


def _divided(name: str, images: ImageSet) -> Protocol:
    queries, gallery = PROTOCOLS[name].divide(images)
    exclude = np.where(np.isin(queries, gallery), np.searchsorted(gallery, queries), -1)
    return Protocol(name, queries, gallery, exclude)


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
