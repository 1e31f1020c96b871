"""What a data set is to the rest of the code: images of three class-disjoint splits."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8

RawImage = bytes | UInt8[np.ndarray, "h w 3"]
"""An encoded image (JPEG, PNG, ...) or a decoded RGB one."""


class Files(Sequence[bytes]):
    """The bytes of files, read when asked for."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "Files": ...
    def __getitem__(self, index: int | slice) -> "bytes | Files":
        if isinstance(index, slice):
            return Files(self.paths[index])
        with open(self.paths[index], "rb") as file:  # noqa: PTH123 (twice as fast as pathlib)
            return file.read()


class Chosen(Sequence[RawImage]):
    """Some elements of another sequence, still read when asked for."""

    def __init__(self, source: Sequence[RawImage], chosen: Int[np.ndarray, "m"]) -> None:
        self.source, self.chosen = source, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> RawImage: ...
    @overload
    def __getitem__(self, index: slice) -> "Chosen": ...
    def __getitem__(self, index: int | slice) -> "RawImage | Chosen":
        if isinstance(index, slice):
            return Chosen(self.source, self.chosen[index])
        return self.source[int(self.chosen[index])]


class Joined(Sequence[RawImage]):
    """Several sequences one after the other, still read when asked for."""

    def __init__(self, parts: Sequence[Sequence[RawImage]]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> RawImage: ...
    @overload
    def __getitem__(self, index: slice) -> Chosen: ...
    def __getitem__(self, index: int | slice) -> RawImage | Chosen:
        if isinstance(index, slice):
            return Chosen(self, np.arange(len(self))[index])
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part][index - (int(self._ends[part - 1]) if part else 0)]


@dataclass(frozen=True)
class ImageSet:
    """The images of one split: random access, read from disk and decoded only when needed.

    Attributes:
      images: encoded images or decoded RGB ones; indexing may read from disk, from any thread.
      labels: class ids, unique over all splits of the data set.
      ids: unique over the data set and stable: the user's own names of the images.
      catalogue: True for a clean catalogue image, False for one taken in the wild.
      gallery: True for an image that is searched, False for a query, where the data set itself
        tells them apart; None where it does not.
    """

    images: Sequence[RawImage]
    labels: Int64[np.ndarray, "n"]
    ids: tuple[str, ...]
    catalogue: Bool[np.ndarray, "n"]
    gallery: Bool[np.ndarray, "n"] | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.images), len(self.labels), len(self.ids), len(self.catalogue)}
        sizes |= {len(self.ids if self.gallery is None else self.gallery)}
        if len(sizes) != 1:
            raise ValueError(f"the columns of an image set differ in length: {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def classes(self) -> Int64[np.ndarray, "c"]:
        """The class ids present, ascending."""
        return np.unique(self.labels)

    def subset(self, index: Int[np.ndarray, "m"]) -> "ImageSet":
        """The images at `index`, in that order, without reading any."""
        images = self.images
        if isinstance(images, Files):
            images = Files(images.paths[i] for i in index)
        elif isinstance(images, Chosen):
            images = Chosen(images.source, images.chosen[index])
        else:
            images = Chosen(images, index)
        ids = tuple(self.ids[i] for i in index)
        gallery = None if self.gallery is None else self.gallery[index]
        return ImageSet(images, self.labels[index], ids, self.catalogue[index], gallery)

    def path(self, index: int) -> str:
        """The file of an image where it is a file, else its id."""
        return self.images.paths[index] if isinstance(self.images, Files) else self.ids[index]


@dataclass(frozen=True)
class Dataset:
    """Three splits that share no class.

    Attributes:
      name: what the user called it.
      class_names: index = class id.
      protocol: one sentence that says how the split was made.
      fingerprint: hex digest that changes when ids, labels, splits or image sizes change.
      test_fingerprint: the same of the test split alone: runs with one of these can be compared.
      skipped: lines on what is left out: each unreadable image as "path: reason", and what the
        rule of `afa.data.listing` leaves out.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    protocol: str
    fingerprint: str
    test_fingerprint: str
    skipped: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, ImageSet]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def everything(self) -> ImageSet:
        """All images as one set: training, validation, then test classes; all are searched."""
        parts = list(self.splits.values())
        return ImageSet(
            Joined([part.images for part in parts]),
            np.concatenate([part.labels for part in parts]),
            tuple(name for part in parts for name in part.ids),
            np.concatenate([part.catalogue for part in parts]),
        )


def fingerprint(rows: Iterable[tuple[str, int, str, int]]) -> str:
    """Digest of a data set from one row an image: (id, label, split, size in bytes).

    Sizes stand in for the images' contents, so that a large set is not read in full. The order
    of the rows does not matter.
    """
    digest = hashlib.sha256()
    for name, label, split, size in sorted(rows):
        digest.update(f"{split}\0{label}\0{size}\0{name}\n".encode())
    return digest.hexdigest()
