"""Protocols: which pictures of a split are queries, and among which each is searched."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from afa.data.types import ImageSet

Index = Int64[np.ndarray, "_"]


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

    leave_one_out: every in-the-wild picture is searched among the others. catalogue (single-view):
    every in-the-wild picture is searched among the catalogue pictures, one a class.
    A split without catalogue pictures has the first alone.
    """
    wild, catalogue = np.flatnonzero(~images.catalogue), np.flatnonzero(images.catalogue)
    found = {"leave_one_out": Protocol("leave_one_out", wild, wild, np.arange(len(wild)))}
    if len(catalogue):
        nowhere = np.full(len(wild), -1)
        found["catalogue"] = Protocol("catalogue", wild, catalogue, nowhere)
    if choice != "auto" and choice in found:
        return [found[choice]]
    return list(found.values())


def drawn_evenly(images: ImageSet, index: Index, count: int, seed: int) -> Index:
    """At most `count` of the pictures at `index` (0: all), spread evenly over the classes.

    The draw is the same for the same seed, and ascending.
    """
    if count == 0 or count >= len(index):
        return index
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(index)
    labels = images.labels[shuffled]
    # Place of each picture within its class: all firsts come before all seconds.
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order], side="left")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - starts
    return np.sort(shuffled[np.argsort(place, kind="stable")[:count]])
