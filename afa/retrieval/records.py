"""What a gallery holds of each image: a unit vector, and who it is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int64

from afa.errors import UserError
from afa.retrieval.exact import check_unit

Id = int | str
Ids = np.ndarray  # int64, or objects that are strings


@dataclass(frozen=True)
class Records:
    """Rows of a gallery; `Records.of` checks them.

    Attributes:
      vectors: unit vectors.
      ids: the user's own name of each image, unique: int64, or strings (objects).
      labels: class number of each image.
      classes: class name of each image, "" where there is none.
      paths: where each image lies, "" where that is not known.
    """

    vectors: Float32[np.ndarray, "n d"]
    ids: Ids
    labels: Int64[np.ndarray, "n"]
    classes: np.ndarray
    paths: np.ndarray

    @classmethod
    def of(
        cls,
        vectors: Any,
        ids: Any,
        classes: Any = None,
        paths: Any = None,
        labels: Int[np.ndarray, "n"] | None = None,
    ) -> "Records":
        """Checked rows.

        Args:
          vectors: unit vectors, (n, d), of any float type.
          ids: a list or an array, unique.
          classes: a list of names; None leaves them without.
          paths: a list; None is not known.
          labels: None numbers the class names in alphabetical order.

        Raises:
          UserError: nothing there, vectors that are not finite or not of unit length, columns of
            different lengths, an id twice, or ids that are neither all whole numbers nor all text.
        """
        vectors = as_vectors("embeddings", vectors)
        if not len(vectors):
            raise UserError("there are no embeddings")
        check_unit("embeddings", vectors)
        names = _words("classes", classes, len(vectors))
        if labels is None:
            labels = np.unique(names.astype(str), return_inverse=True)[1]
        for name, column in (("ids", ids), ("labels", labels)):
            _check_length(name, column, len(vectors))
        places = _words("paths", paths, len(vectors))
        return cls(vectors, as_ids("ids", ids), labels.astype(np.int64), names, places)

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, index: np.ndarray | slice) -> "Records":
        """The rows at `index`."""
        return Records(*(column[index] for column in self._columns()))

    def joined(self, more: "Records") -> "Records":
        """These rows, then those.

        Raises:
          UserError: other dimensions, or ids of the other kind.
        """
        check_dimension("embeddings", more.vectors, self.vectors.shape[1])
        check_kind(more.ids, self.ids.dtype)
        both = zip(self._columns(), more._columns(), strict=True)
        return Records(*(np.concatenate(pair) for pair in both))

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.vectors, self.ids, self.labels, self.classes, self.paths


def as_vectors(name: str, values: Any) -> Float32[np.ndarray, "n d"]:
    """`values` as float32 rows.

    Raises:
      UserError: no table of real numbers.
    """
    try:
        array = np.asarray(values)
    except ValueError:
        raise UserError(f"{name} must be a table, but its rows differ in length") from None
    if array.ndim != 2:
        raise UserError(f"{name} must have the shape (rows, dimensions), not {array.shape}")
    if not (array.dtype == np.float32 or np.issubdtype(array.dtype, np.floating)):
        raise UserError(f"{name} must be real numbers, not {array.dtype}")
    if not array.shape[1]:
        raise UserError(f"{name} have no dimensions")
    return np.ascontiguousarray(array, np.float32)


def as_ids(name: str, ids: Any) -> Ids:
    """Ids as an array of int64, or of objects that are strings.

    Raises:
      UserError: an id twice, an empty one, or ids that are neither all whole numbers nor all text.
    """
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__"):
        raise UserError(f"{name}={ids!r} must be a list")
    array = ids if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" else _objects(ids)
    if array.ndim != 1:
        raise UserError(f"{name} must be a list, not of the shape {array.shape}")
    if array.dtype.kind in "iu":
        array = _whole(name, array)
    elif len(array) and all(isinstance(each, str) for each in array):
        array = array.astype(object)
        if "" in array:
            raise UserError(f"{name} must not be empty, but one is ''")
    elif all(isinstance(each, int | np.integer) and not isinstance(each, bool) for each in array):
        array = _whole(name, array)
    else:
        plain = [each for each in array if isinstance(each, Id) and not isinstance(each, bool)]
        kind = type(plain[0]) if plain else None
        odd = next(each for each in array if type(each) is not kind)
        raise UserError(f"{name} must be all whole numbers or all text, but {odd!r} is there")
    if len(set(array.tolist())) < len(array):
        seen: set[Id] = set()
        twice = next(each for each in array.tolist() if each in seen or seen.add(each))
        raise UserError(f"{name} must be unique, but {twice!r} stands there twice")
    return array


def check_dimension(name: str, vectors: Float32[np.ndarray, "n d"], dimension: int) -> None:
    """Refuses vectors of another length than the index holds.

    Raises:
      UserError: naming both.
    """
    if vectors.shape[1] != dimension:
        raise UserError(f"{name} have {vectors.shape[1]} dimensions, the index has {dimension}")


def kind_of(ids: np.dtype) -> str:
    """What ids of this type are, in words."""
    return "text" if ids.kind == "O" else "whole numbers"


def check_kind(ids: Ids, expected: np.dtype) -> None:
    """Refuses ids of the other kind than the index holds.

    Raises:
      UserError: naming both.
    """
    if ids.dtype != expected:
        ours, theirs = kind_of(expected), kind_of(ids.dtype)
        raise UserError(f"ids must be {ours}, as those of the index, not {theirs}")


def _whole(name: str, array: np.ndarray) -> Int64[np.ndarray, "_"]:
    limits = np.iinfo(np.int64)
    for each in (array.min(), array.max()) if len(array) else ():
        if not limits.min <= each <= limits.max:
            raise UserError(f"{name} must fit into 64 bits, but {each} is there")
    return array.astype(np.int64)


def _objects(values: Any) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return column


def _words(name: str, words: Any, count: int) -> np.ndarray:
    if words is None:
        return np.full(count, "", object)
    _check_length(name, words, count)
    column = _objects(words)
    odd = [each for each in column if not isinstance(each, str)]
    if odd:
        raise UserError(f"{name} must be text, but {odd[0]!r} is there")
    return column


def _check_length(name: str, column: Any, count: int) -> None:
    if not hasattr(column, "__len__") or isinstance(column, str):
        raise UserError(f"{name}={column!r} must be a list")
    if len(column) != count:
        raise UserError(f"{name} has {len(column)} entries for {count} embeddings")
