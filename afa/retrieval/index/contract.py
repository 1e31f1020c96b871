"""The interface of all indexes, with the checks that are common to all engines.

Arguments are checked here, before an engine is called, because engines differ on bad input: with
NaN some crash and others return results, missing results are filled with id 0, and unknown options
are accepted and fail later.
"""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from afa.errors import UserError
from afa.retrieval.exact import NORM_TOLERANCE, check_unit
from afa.retrieval.index.uri import Address
from afa.retrieval.records import (
    Id,
    Ids,
    Records,
    as_ids,
    as_vectors,
    check_dimension,
    check_kind,
)

DEFAULT_K = 10
SHORTEST, LONGEST = 1 - NORM_TOLERANCE, 1 + NORM_TOLERANCE  # squared
FLOAT32 = np.dtype(np.float32)
NO_RESULT = np.float32(-np.inf)  # score of a missing result


@dataclass(slots=True)
class Results:
    """Results of several queries, best first.

    Attributes:
      ids: (q, k); undefined for missing results.
      scores: cosine similarities; -inf for missing results.
    """

    ids: Ids
    scores: Float32[np.ndarray, "q k"]

    @property
    def found(self) -> Bool[np.ndarray, "q k"]:
        """True for results, False for missing ones."""
        return self.scores > NO_RESULT

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[list[Id], Float32[np.ndarray, "_"]]]:
        """Yields ids and scores of each query, without missing results."""
        for ids, scores, found in zip(self.ids, self.scores, self.found, strict=True):
            yield ids[found].tolist(), scores[found]


@dataclass(frozen=True)
class Entry:
    """An image of the gallery."""

    id: Id
    class_name: str
    path: str


class Index(abc.ABC):
    """A searchable gallery; built and opened by `afa.retrieval.index`.

    Every engine takes unit vectors and returns cosine similarities, the user's own ids (integers or
    text), class names and paths.

    Attributes:
      uri: address of the engine, with its options.
      manifest: origin of the vectors (`checkpoint`, `preprocessing`, ...).
      dimension: of a vector.
    """

    uri: str
    manifest: dict[str, Any]
    dimension: int

    # ---- queries -------------------------------------------------------------------------------

    def search(
        self,
        queries: Any,
        k: int | None = None,
        classes: Sequence[str] | None = None,
        ids: Sequence[Id] | None = None,
    ) -> Results:
        """Returns the k most similar images of each query.

        Args:
          queries: unit vectors, (q, d).
          k: results per query; None for 10, or all images if there are fewer.
          classes: restricts the search to images of these classes.
          ids: restricts the search to these images; unknown ids are ignored.

        Returns:
          k results per query; some are missing (`Results.found`) if the filter leaves fewer
          images or an approximate engine finds fewer.

        Raises:
          UserError: queries of another dimension, not finite or not of unit length, a k below 1
            or above the number of images, an unknown class, or an empty index.
        """
        if not self._is_one_query(queries):
            queries = self._checked(queries)
        k = min(DEFAULT_K, max(1, len(self))) if k is None else k
        if not 1 <= k <= len(self):
            raise UserError(f"k={k} is not between 1 and {len(self)}, the images in the index")
        chosen = None if classes is None and ids is None else self._filter(classes, ids)
        if not len(queries):
            return Results(np.zeros((0, k), self._id_type()), np.zeros((0, k), np.float32))
        return self._search(queries, k, chosen)

    def range_search(
        self,
        queries: Any,
        score: float,
        classes: Sequence[str] | None = None,
        ids: Sequence[Id] | None = None,
    ) -> list[tuple[list[Id], Float32[np.ndarray, "_"]]]:
        """Returns all images at least this similar to each query, best first.

        An approximate engine may miss some.

        Args:
          queries: unit vectors, (q, d).
          score: smallest cosine similarity.
          classes, ids: as in `search`.

        Raises:
          UserError: as `search`, or a score outside of [-1, 1].
        """
        queries = self._checked(queries)
        if not -1 <= score <= 1:
            raise UserError(f"score={score} must lie between -1 and 1")
        chosen = self._filter(classes, ids)
        return self._range(queries, float(score), chosen) if len(queries) else []

    @abc.abstractmethod
    def lookup(self, ids: Sequence[Id]) -> list[Entry]:
        """Returns class and path of images.

        Raises:
          UserError: an unknown id.
        """

    def contains(self, ids: Sequence[Id] | Ids) -> Bool[np.ndarray, "_"]:
        """Returns which of these ids are in the index.

        Raises:
          UserError: ids of the other kind.
        """
        chosen = as_ids("ids", ids)
        check_kind(chosen, self._id_type())
        return self._contains(chosen)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images, without removed ones."""

    @abc.abstractmethod
    def info(self) -> dict[str, Any]:
        """Returns a description as JSON values: uri, count, dimension, engine, ..."""

    def require(self, **expected: Any) -> None:
        """Checks that the vectors can be compared with the queries of a model.

        Args:
          expected: manifest fields and their values for the model, such as `checkpoint` and
            `preprocessing`.

        Raises:
          UserError: names the fields that differ, with both values.
        """
        different = [name for name in expected if self.manifest.get(name) != expected[name]]
        if different:
            differences = ", ".join(
                f"{name} {self.manifest.get(name)!r}, not {expected[name]!r}" for name in different
            )
            raise UserError(f"the index does not match: {differences}; export and build it again")

    def require_new(self, ids: Sequence[Id] | Ids) -> None:
        """Checks that no id is in the index.

        Raises:
          UserError: names the first that is, or ids of the other kind.
        """
        known = self.contains(ids)
        if known.any():
            one = as_ids("ids", ids)[known.argmax()]
            raise UserError(f"the index already contains {one!r} (update replaces an image)")

    # ---- changes -------------------------------------------------------------------------------

    def add(self, records: Records) -> None:
        """Adds images.

        Raises:
          UserError: another dimension, ids of the other kind, or an id that is already in the
            index. Nothing is added then.
        """
        check_dimension("embeddings", records.vectors, self.dimension)
        self.require_new(records.ids)
        self._add(records)

    def remove(self, ids: Sequence[Id]) -> None:
        """Removes images.

        Raises:
          UserError: an unknown id, or all images. Nothing is removed then.
        """
        chosen = self._known(ids)
        if len(chosen) >= len(self):
            raise UserError(f"an index cannot become empty: {len(chosen)} of {len(self)} images")
        if len(chosen):
            self._remove(chosen)

    def update(self, records: Records) -> None:
        """Replaces images by others with the same ids.

        Raises:
          UserError: another dimension, or an unknown id. Nothing is replaced then.
        """
        check_dimension("embeddings", records.vectors, self.dimension)
        self._known(records.ids)
        self._update(records)

    @abc.abstractmethod
    def save(self, directory: Path | str | None = None) -> None:
        """Writes the index atomically.

        Args:
          directory: None for the one it was last opened or saved in.

        Raises:
          UserError: no directory, a full disk, or an index that another process has changed.
        """

    @abc.abstractmethod
    def written_engine(self, stage: Path) -> dict[str, Any]:
        """Writes the engine's files to a staging folder; returns its manifest entry: `uri`, and the
        fields needed to open it again."""

    @abc.abstractmethod
    def opened(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Sets the directory and the manifest on disk."""

    def close(self) -> None:  # noqa: B027 - most engines have none
        """Closes connections."""

    # ---- implemented by each engine ------------------------------------------------------------

    @abc.abstractmethod
    def _search(self, queries: np.ndarray, k: int, chosen: Any) -> Results: ...

    @abc.abstractmethod
    def _range(
        self, queries: np.ndarray, score: float, chosen: Any
    ) -> list[tuple[list[Id], np.ndarray]]: ...

    @abc.abstractmethod
    def _choose(self, classes: Sequence[str] | None, ids: Ids | None) -> Any:
        """Returns a filter in the form of the engine; at least one argument is not None."""

    @abc.abstractmethod
    def _check_classes(self, classes: Sequence[str]) -> None:
        """Checks that the index contains these classes."""

    @abc.abstractmethod
    def _id_type(self) -> np.dtype: ...

    @abc.abstractmethod
    def _contains(self, ids: Ids) -> Bool[np.ndarray, "_"]:
        """Returns which of these ids are in the index."""

    @abc.abstractmethod
    def _add(self, records: Records) -> None: ...

    @abc.abstractmethod
    def _remove(self, ids: Ids) -> None: ...

    @abc.abstractmethod
    def _update(self, records: Records) -> None: ...

    # ---- checks --------------------------------------------------------------------------------

    def _checked(self, queries: Any) -> Float32[np.ndarray, "q d"]:
        queries = as_vectors("queries", queries)
        check_dimension("queries", queries, self.dimension)
        check_unit("queries", queries)
        return queries

    def _is_one_query(self, queries: Any) -> bool:
        """Whether this is one valid query: a fast check for services."""
        if type(queries) is not np.ndarray or queries.shape != (1, self.dimension):
            return False
        row = queries[0]
        return queries.dtype == FLOAT32 and SHORTEST <= float(row.dot(row)) <= LONGEST

    def _filter(self, classes: Sequence[str] | None, ids: Sequence[Id] | None) -> Any:
        if classes is None and ids is None:
            return None
        if classes is not None:
            if isinstance(classes, str):
                raise UserError(f"classes={classes!r} must be a list of class names")
            self._check_classes(classes)
        chosen = None if ids is None else as_ids("ids", ids)
        if chosen is not None and len(chosen):
            check_kind(chosen, self._id_type())
        return self._choose(classes, chosen)

    def _known(self, ids: Sequence[Id] | Ids) -> Ids:
        chosen = as_ids("ids", ids)
        if not len(chosen):
            return chosen
        check_kind(chosen, self._id_type())
        known = self._contains(chosen)
        if not known.all():
            raise UserError(f"the index contains no image {chosen[known.argmin()]!r}")
        return chosen


@dataclass(frozen=True)
class Server:
    """An engine outside of this process, which holds the vectors.

    Attributes:
      options: returns the options of an address; UserError if one is invalid.
      create: address, records, manifest -> a new index, with `drop` to remove it.
      read: address, directory, manifest -> the index of that manifest.
    """

    options: Callable[[Address], dict[str, Any]]
    create: Callable[[Address, Records, dict[str, Any]], Any]
    read: Callable[[Address, Path, dict[str, Any]], Any]
