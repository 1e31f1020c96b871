"""Types of a data set: images in three class-disjoint splits."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8

RawImage = bytes | UInt8[np.ndarray, "h w 3"]
"""An encoded image (JPEG, PNG, ...) or a decoded RGB one."""


class Files(Sequence[bytes]):
    """The contents of files, read on access."""

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


class Subset(Sequence[RawImage]):
    """The elements of a sequence at given indices, read on access."""

    def __init__(self, source: Sequence[RawImage], index: Int[np.ndarray, "m"]) -> None:
        self.source, self.rows = source, index

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> RawImage: ...
    @overload
    def __getitem__(self, index: slice) -> "Subset": ...
    def __getitem__(self, index: int | slice) -> "RawImage | Subset":
        if isinstance(index, slice):
            return Subset(self.source, self.rows[index])
        return self.source[int(self.rows[index])]


class Joined(Sequence[RawImage]):
    """Concatenation of sequences, read on access."""

    def __init__(self, parts: Sequence[Sequence[RawImage]]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> RawImage: ...
    @overload
    def __getitem__(self, index: slice) -> Subset: ...
    def __getitem__(self, index: int | slice) -> RawImage | Subset:
        if isinstance(index, slice):
            return Subset(self, np.arange(len(self))[index])
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part][index - (int(self._ends[part - 1]) if part else 0)]


@dataclass(frozen=True)
class ImageSet:
    """The images of one split, with random access; read from disk and decoded on access.

    Attributes:
      images: encoded or decoded RGB images; indexing may read from disk and is thread-safe.
      labels: class ids, numbered over all splits of the data set.
      ids: names of the images, unique in the data set and stable.
      catalogue: True for a clean catalogue image, False for one taken in the wild.
      gallery: True for a gallery image, False for a query; None if the data set does not separate
        them.
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
        """The class ids that occur, in ascending order."""
        return np.unique(self.labels)

    def subset(self, index: Int[np.ndarray, "m"]) -> "ImageSet":
        """Returns the images at `index`, in that order, without reading them."""
        images = self.images
        if isinstance(images, Files):
            images = Files(images.paths[i] for i in index)
        elif isinstance(images, Subset):
            images = Subset(images.source, images.rows[index])
        else:
            images = Subset(images, index)
        ids = tuple(self.ids[i] for i in index)
        gallery = None if self.gallery is None else self.gallery[index]
        return ImageSet(images, self.labels[index], ids, self.catalogue[index], gallery)

    def path(self, index: int) -> str:
        """Returns the path of an image if it is a file, otherwise its id."""
        return self.images.paths[index] if isinstance(self.images, Files) else self.ids[index]


@dataclass(frozen=True)
class Dataset:
    """A data set in three splits that share no class.

    Attributes:
      name: `data.name`, or the name of the directory.
      class_names: name of each class, indexed by class id.
      protocol: one sentence that describes the split.
      fingerprint: hex digest that changes when ids, labels, splits or image sizes change.
      test_fingerprint: the same for the test split alone; runs that share it are comparable.
      skipped: one line per unreadable image ("path: reason") and per kind of file that
        `afa.data.listing` skips.
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
        """Returns all images as one gallery: training, validation, then test classes."""
        parts = list(self.splits.values())
        return ImageSet(
            Joined([part.images for part in parts]),
            np.concatenate([part.labels for part in parts]),
            tuple(name for part in parts for name in part.ids),
            np.concatenate([part.catalogue for part in parts]),
        )


def fingerprint(rows: Iterable[tuple[str, int, str, int]]) -> str:
    """Returns a digest of a data set from one (id, label, split, size in bytes) per image.

    File sizes are used instead of contents, so that no image has to be read. The order of the rows
    does not matter.
    """
    digest = hashlib.sha256()
    for name, label, split, size in sorted(rows):
        digest.update(f"{split}\0{label}\0{size}\0{name}\n".encode())
    return digest.hexdigest()
