"""Rows of a gallery: unit vectors with ids, classes and paths."""

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
    """Rows of a gallery. `Records.of` makes checked ones.

    Attributes:
      vectors: unit vectors.
      ids: unique id of each image: int64, or strings (object dtype).
      labels: class number of each image.
      classes: class name of each image, "" if it has none.
      paths: path of each image, "" if it is not known.
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
        """Makes checked records.

        Args:
          vectors: unit vectors, (n, d), of any float type.
          ids: unique ids, all integers or all text.
          classes: class names; None for no classes.
          paths: paths; None if they are not known.
          labels: class numbers; None numbers the class names in alphabetical order.

        Raises:
          UserError: no rows, vectors that are not finite or not of unit length, columns of
            different lengths, a duplicate id, or ids that are neither all integers nor all text.
        """
        vectors = as_vectors("embeddings", vectors)
        if not len(vectors):
            raise UserError("there are no embeddings")
        check_unit("embeddings", vectors)
        names = _texts("classes", classes, len(vectors))
        if labels is None:
            labels = np.unique(names.astype(str), return_inverse=True)[1]
        for name, column in (("ids", ids), ("labels", labels)):
            _check_length(name, column, len(vectors))
        locations = _texts("paths", paths, len(vectors))
        return cls(vectors, as_ids("ids", ids), labels.astype(np.int64), names, locations)

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, index: np.ndarray | slice) -> "Records":
        """Selects the rows at `index`."""
        return Records(*(column[index] for column in self._columns()))

    def joined(self, more: "Records") -> "Records":
        """Concatenates these rows and `more`.

        Raises:
          UserError: different dimensions or kinds of ids.
        """
        check_dimension("embeddings", more.vectors, self.vectors.shape[1])
        check_kind(more.ids, self.ids.dtype)
        both = zip(self._columns(), more._columns(), strict=True)
        return Records(*(np.concatenate(pair) for pair in both))

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.vectors, self.ids, self.labels, self.classes, self.paths


def as_vectors(name: str, values: Any) -> Float32[np.ndarray, "n d"]:
    """Converts `values` to a float32 array (n, d).

    Raises:
      UserError: not a two-dimensional array of real numbers.
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
    """Converts ids to an array of int64, or of strings (object dtype).

    Raises:
      UserError: a duplicate or empty id, or ids that are neither all integers nor all text.
    """
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__"):
        raise UserError(f"{name}={ids!r} must be a list")
    array = ids if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" else _objects(ids)
    if array.ndim != 1:
        raise UserError(f"{name} must be a list, not of the shape {array.shape}")
    if array.dtype.kind in "iu":
        array = _as_int64(name, array)
    elif len(array) and all(isinstance(each, str) for each in array):
        array = array.astype(object)
        if "" in array:
            raise UserError(f"{name} must not be empty, but one is ''")
    elif all(isinstance(each, int | np.integer) and not isinstance(each, bool) for each in array):
        array = _as_int64(name, array)
    else:
        plain = [each for each in array if isinstance(each, Id) and not isinstance(each, bool)]
        kind = type(plain[0]) if plain else None
        odd = next(each for each in array if type(each) is not kind)
        raise UserError(f"{name} must be all whole numbers or all text, but one is {odd!r}")
    if len(set(array.tolist())) < len(array):
        seen: set[Id] = set()
        duplicate = next(each for each in array.tolist() if each in seen or seen.add(each))
        raise UserError(f"{name} must be unique, but {duplicate!r} appears twice")
    return array


def check_dimension(name: str, vectors: Float32[np.ndarray, "n d"], dimension: int) -> None:
    """Checks that vectors have the dimension of the index.

    Raises:
      UserError: names both dimensions.
    """
    if vectors.shape[1] != dimension:
        raise UserError(f"{name} have {vectors.shape[1]} dimensions, the index has {dimension}")


def kind_of(ids: np.dtype) -> str:
    """Name of a dtype of ids in messages."""
    return "text" if ids.kind == "O" else "whole numbers"


def check_kind(ids: Ids, expected: np.dtype) -> None:
    """Checks that ids have the dtype of the ids of the index.

    Raises:
      UserError: names both kinds of ids.
    """
    if ids.dtype != expected:
        ours, theirs = kind_of(expected), kind_of(ids.dtype)
        raise UserError(f"ids must be {ours}, as those of the index, not {theirs}")


def _as_int64(name: str, array: np.ndarray) -> Int64[np.ndarray, "_"]:
    limits = np.iinfo(np.int64)
    for each in (array.min(), array.max()) if len(array) else ():
        if not limits.min <= each <= limits.max:
            raise UserError(f"{name} must fit into 64 bits, but one is {each}")
    return array.astype(np.int64)


def _objects(values: Any) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return column


def _texts(name: str, values: Any, count: int) -> np.ndarray:
    if values is None:
        return np.full(count, "", object)
    _check_length(name, values, count)
    column = _objects(values)
    odd = [each for each in column if not isinstance(each, str)]
    if odd:
        raise UserError(f"{name} must be text, but one is {odd[0]!r}")
    return column


def _check_length(name: str, column: Any, count: int) -> None:
    if not hasattr(column, "__len__") or isinstance(column, str):
        raise UserError(f"{name}={column!r} must be a list")
    if len(column) != count:
        raise UserError(f"{name} has {len(column)} entries for {count} embeddings")
