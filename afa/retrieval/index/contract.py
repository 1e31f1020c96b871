"""What every index can do, and what it refuses: one contract, whichever engine answers.

Checks stand here once, before an engine sees anything: NaN kills some engines and is answered by
others, missing results are filled up with the id 0, unknown options are accepted and fail later.
"""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from afa.errors import UserError
from afa.retrieval.exact import NORM_TOLERANCE, check_unit
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
NOTHING = np.float32(-np.inf)  # score where there is no result


@dataclass(slots=True)
class Results:
    """The results of some queries, best first.

    Attributes:
      ids: (q, k); what stands where there is no result means nothing.
      scores: cosine similarities; -inf where an engine found fewer than k.
    """

    ids: Ids
    scores: Float32[np.ndarray, "q k"]

    @property
    def found(self) -> Bool[np.ndarray, "q k"]:
        """Where there is a result."""
        return self.scores > NOTHING

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[list[Id], Float32[np.ndarray, "_"]]]:
        """Ids and scores of one query after the other, without what is missing."""
        for ids, scores, found in zip(self.ids, self.scores, self.found, strict=True):
            yield ids[found].tolist(), scores[found]


@dataclass(frozen=True)
class Entry:
    """An image of the gallery."""

    id: Id
    class_name: str
    path: str


class Index(abc.ABC):
    """A gallery that answers queries; `afa.retrieval.index` makes and opens them.

    Every engine takes and gives the same: unit vectors, cosine similarities, the user's own ids
    (whole numbers or text), class names and paths.

    Attributes:
      uri: which engine answers, and how.
      manifest: who made the vectors (`checkpoint`, `preprocessing`, ...).
      dimension: of a vector.
    """

    uri: str
    manifest: dict[str, Any]
    dimension: int

    # ---- questions -----------------------------------------------------------------------------

    def search(
        self,
        queries: Any,
        k: int | None = None,
        classes: Sequence[str] | None = None,
        ids: Sequence[Id] | None = None,
    ) -> Results:
        """The k most similar images of each query.

        Args:
          queries: unit vectors, (q, d).
          k: results a query; None is 10, or all images where there are fewer.
          classes: searches among images of these classes alone.
          ids: searches among these images alone; ids that the index does not hold count for
            nothing.

        Returns:
          k results a query; fewer (`Results.found`) when the filter leaves fewer, or when an
          approximate engine finds fewer.

        Raises:
          UserError: queries of another dimension, not finite or not of unit length, a k that is
            below 1 or above the number of images, a class that the index does not hold, or an
            empty index.
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
        """Every image at least this similar to each query, best first; of an approximate engine
        those that it finds.

        Args:
          queries: unit vectors, (q, d).
          score: least cosine similarity.
          classes, ids: as in `search`.

        Raises:
          UserError: as `search`, or a score that is no similarity.
        """
        queries = self._checked(queries)
        if not -1 <= score <= 1:
            raise UserError(f"score={score} must lie between -1 and 1")
        chosen = self._filter(classes, ids)
        return self._range(queries, float(score), chosen) if len(queries) else []

    @abc.abstractmethod
    def lookup(self, ids: Sequence[Id]) -> list[Entry]:
        """Class and path of images.

        Raises:
          UserError: an id that the index does not hold.
        """

    def holds(self, ids: Sequence[Id] | Ids) -> Bool[np.ndarray, "_"]:
        """Which of these ids the index holds.

        Raises:
          UserError: ids of the other kind.
        """
        chosen = as_ids("ids", ids)
        check_kind(chosen, self._id_type())
        return self._held(chosen)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Images that can be found."""

    @abc.abstractmethod
    def info(self) -> dict[str, Any]:
        """What there is to know of it, as JSON values: uri, count, dimension, engine, ..."""

    def require(self, **expected: Any) -> None:
        """Refuses an index over vectors that the queries at hand cannot be compared with.

        Args:
          expected: fields of the manifest and the values that the query's model has, such as
            `checkpoint` and `preprocessing`.

        Raises:
          UserError: naming the fields that differ, with both values.
        """
        different = [name for name in expected if self.manifest.get(name) != expected[name]]
        if different:
            told = ", ".join(
                f"{name} {self.manifest.get(name)!r}, not {expected[name]!r}" for name in different
            )
            raise UserError(f"the index does not fit: {told}; export and build it again")

    def require_new(self, ids: Sequence[Id] | Ids) -> None:
        """Refuses ids that the index holds already.

        Raises:
          UserError: naming the first, or ids of the other kind.
        """
        there = self.holds(ids)
        if there.any():
            one = as_ids("ids", ids)[there.argmax()]
            raise UserError(f"the index holds {one!r} already (update replaces an image)")

    # ---- changes -------------------------------------------------------------------------------

    def add(self, records: Records) -> None:
        """Adds images.

        Raises:
          UserError: another dimension, ids of the other kind, or an id that is there already.
            Nothing is added then.
        """
        check_dimension("embeddings", records.vectors, self.dimension)
        self.require_new(records.ids)
        self._add(records)

    def remove(self, ids: Sequence[Id]) -> None:
        """Removes images.

        Raises:
          UserError: an id that is not there, or all that there are. Nothing is removed then.
        """
        chosen = self._known(ids)
        if len(chosen) >= len(self):
            raise UserError(f"an index cannot become empty: {len(chosen)} of {len(self)} images")
        if len(chosen):
            self._remove(chosen)

    def update(self, records: Records) -> None:
        """Replaces images by others of the same ids.

        Raises:
          UserError: another dimension, or an id that is not there. Nothing is replaced then.
        """
        check_dimension("embeddings", records.vectors, self.dimension)
        self._known(records.ids)
        self._update(records)

    @abc.abstractmethod
    def save(self, directory: Path | str | None = None) -> None:
        """Writes the index, whole or not at all.

        Args:
          directory: None is where it was opened or saved last.

        Raises:
          UserError: no directory, a full disk, or an index that another process changed since.
        """

    @abc.abstractmethod
    def written_engine(self, stage: Path) -> dict[str, Any]:
        """Writes what the engine keeps on disk into a staged folder; returns what the manifest says
        of it: `uri`, and what it takes to open it again."""

    @abc.abstractmethod
    def opened(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Notes where it stands on disk, and what its manifest says there."""

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Lets go of connections."""

    # ---- what an engine supplies ---------------------------------------------------------------

    @abc.abstractmethod
    def _search(self, queries: np.ndarray, k: int, chosen: Any) -> Results: ...

    @abc.abstractmethod
    def _range(
        self, queries: np.ndarray, score: float, chosen: Any
    ) -> list[tuple[list[Id], np.ndarray]]: ...

    @abc.abstractmethod
    def _choose(self, classes: Sequence[str] | None, ids: Ids | None) -> Any:
        """What a filter leaves, in the engine's own terms; both None never come here."""

    @abc.abstractmethod
    def _check_classes(self, classes: Sequence[str]) -> None:
        """Refuses a class that the index does not hold."""

    @abc.abstractmethod
    def _id_type(self) -> np.dtype: ...

    @abc.abstractmethod
    def _held(self, ids: Ids) -> Bool[np.ndarray, "_"]:
        """Which of these ids the index holds."""

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
        """One sound query: how a service asks, and all the checking it pays for."""
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
        there = self._held(chosen)
        if not there.all():
            raise UserError(f"the index holds no image {chosen[there.argmin()]!r}")
        return chosen
