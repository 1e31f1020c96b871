"""An index in memory: an engine over fixed rows, and a tail of rows added since.

Engines are never modified, because their updates are not safe (a failed ScaNN upsert leaves its ids
changed). Added rows go to a tail that is searched exactly, and removed rows are filtered out. When
either exceeds a share of the rows, the engine is rebuilt over the remaining rows.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from afa.errors import UserError, nearest
from afa.manifest import OWN_FIELDS, named_by_content, publish, refuse_if_changed, staged
from afa.retrieval import export
from afa.retrieval.exact import PADDING
from afa.retrieval.index import flat
from afa.retrieval.index.contract import Entry, Index, Results
from afa.retrieval.index.uri import Address
from afa.retrieval.records import Id, Ids, Records, kind_of

REBUILT_SHARE = 0.2  # rebuild when more than this share of the rows was added or removed
REBUILT_ROWS = 1000  # and more than this number


Allowed = Bool[np.ndarray, "n"] | None  # mask of rows that may be returned; None for all
TopK = tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]  # rows and similarities
RangeResults = tuple[Int64[np.ndarray, "m"], Float32[np.ndarray, "m"]]  # of one query


class Engine(abc.ABC):
    """A search algorithm over fixed rows."""

    @abc.abstractmethod
    def search(self, queries: Float32[np.ndarray, "q d"], k: int, allowed: Allowed) -> TopK:
        """Returns rows and similarities, best first; -1 and -inf if there are fewer than k."""

    @abc.abstractmethod
    def within(
        self, queries: Float32[np.ndarray, "q d"], score: float, allowed: Allowed
    ) -> list[RangeResults]:
        """Returns rows at least this similar and their similarities, in any order."""

    @abc.abstractmethod
    def info(self) -> dict[str, Any]:
        """Returns the settings as JSON values; stored in the manifest and used to open it again."""

    @abc.abstractmethod
    def write(self, stage: Path) -> dict[str, Any]:
        """Writes the built engine, if worth storing; returns what is needed to open it again."""


CACHED = ("_ids", "_row_of", "_names_and_labels")  # properties of `LocalIndex`
Builder = Callable[[Float32[np.ndarray, "n d"]], Engine]


@dataclass(frozen=True)
class InProcess:
    """An engine in the memory of this process.

    Attributes:
      options: returns the options of an address; UserError if one is invalid.
      builder: address, and `Engine.info` of a built engine or None -> builder of such engines.
      read: directory, vectors, what `Engine.write` returned, address -> the engine; None if the
        engine is not stored but built again.
    """

    options: Callable[[Address], dict[str, Any]]
    builder: Callable[[Address, dict[str, Any] | None], Builder]
    read: Callable[[Path, Float32[np.ndarray, "n d"], dict[str, Any], Address], Engine] | None = (
        None
    )


class LocalIndex(Index):
    """An index in memory; built and opened by `afa.retrieval.index`.

    Args:
      uri: address of the engine.
      build: builds an engine over given rows.
      records: all rows, including removed ones; the engine contains the first of them.
      manifest: origin of the vectors.
      engine: over the first rows; None to build it over all.
      built: number of rows in `engine`.
      alive: True for rows that are not removed; None for all.
    """

    def __init__(
        self,
        uri: str,
        build: Builder,
        records: Records,
        manifest: dict[str, Any],
        engine: Engine | None = None,
        built: int = 0,
        alive: Bool[np.ndarray, "n"] | None = None,
    ) -> None:
        self.uri, self.manifest = uri, manifest
        self.dimension = records.vectors.shape[1]
        self._build = build
        self._base, self._tail = records, None
        if engine is not None and built < len(records):
            self._base, self._tail = records.rows(slice(built)), records.rows(slice(built, None))
        self._engine = engine or build(records.vectors)
        self._alive = np.ones(len(records), bool) if alive is None else alive
        self._directory: Path | None = None
        self._saved: dict[str, Any] | None = None  # manifest of files that can be kept
        self._published: dict[str, Any] = {}
        self._update_caches()

    # ---- queries -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._count

    def records(self) -> Records:
        """Returns all images that are not removed."""
        rows = self._base if self._tail is None else self._base.joined(self._tail)
        return rows if self._all_alive else rows.rows(self._alive)

    def lookup(self, ids: Sequence[Id]) -> list[Entry]:
        rows = [self._row_of[each] for each in self._known(ids).tolist()]
        return [self._entry(row) for row in rows]

    def info(self) -> dict[str, Any]:
        """Returns uri, count, dimension, kind of ids, numbers of added and removed rows, and the
        engine's settings."""
        return {
            "uri": self.uri,
            "count": len(self),
            "dimension": self.dimension,
            "ids": kind_of(self._id_type()),
            "classes": len(self._class_names()),
            "added": 0 if self._tail is None else len(self._tail),
            "removed": int((~self._alive).sum()),
            "checkpoint": self.manifest.get("checkpoint"),
            "engine": self._engine.info(),
        }

    def _search(self, queries: np.ndarray, k: int, chosen: Bool[np.ndarray, "n"] | None) -> Results:
        if chosen is None and self._all_alive and self._tail is None:
            rows, scores = self._engine.search(queries, k, None)
        else:
            rows, scores = self._search_parts(queries, k, chosen)
        return Results(self._ids[rows], scores)

    def _search_parts(
        self, queries: np.ndarray, k: int, chosen: Bool[np.ndarray, "n"] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        base, tail = self._allowed(chosen)
        results = self._engine.search(queries, min(k, len(self._base)), base)
        if self._tail is not None:
            rows, scores = flat.topk(queries, self._tail.vectors, min(k, len(self._tail)), tail)
            rows = np.where(rows == PADDING, PADDING, rows + len(self._base))
            results = flat.merged(results, (rows, scores), k)
        missing = ((0, 0), (0, k - results[0].shape[1]))
        rows = np.pad(results[0], missing, constant_values=PADDING)
        return rows, np.pad(results[1], missing, constant_values=-np.inf)

    def _range(
        self, queries: np.ndarray, score: float, chosen: Bool[np.ndarray, "n"] | None
    ) -> list[tuple[list[Id], np.ndarray]]:
        base, tail = self._allowed(chosen)
        results = []
        for query, part in zip(queries, self._engine.within(queries, score, base), strict=True):
            rows, scores = part
            if self._tail is not None:
                tail_rows, tail_scores = flat.within(query, self._tail.vectors, score, tail)
                rows = np.concatenate([rows, tail_rows + len(self._base)])
                scores = np.concatenate([scores, tail_scores])
            order = np.argsort(-scores, kind="stable")
            results.append((self._ids[rows[order]].tolist(), scores[order]))
        return results

    def _allowed(
        self, chosen: Bool[np.ndarray, "n"] | None
    ) -> tuple[Bool[np.ndarray, "b"] | None, Bool[np.ndarray, "t"] | None]:
        """Returns masks of the allowed rows of the engine and of the tail; None for all."""
        if chosen is None and self._all_alive:
            return None, None
        allowed = self._alive if chosen is None else self._alive & chosen
        count = len(self._base)
        base = allowed[:count]
        return None if base.all() else base, allowed[count:]

    def _choose(self, classes: Sequence[str] | None, ids: Ids | None) -> Bool[np.ndarray, "n"]:
        chosen = np.ones(len(self._alive), bool)
        if classes is not None:
            chosen &= np.isin(self._labels, [self._class_names().index(name) for name in classes])
        if ids is not None:
            listed = np.zeros(len(self._alive), bool)
            row_of = self._row_of
            listed[[row_of[each] for each in ids.tolist() if each in row_of]] = True
            chosen &= listed
        return chosen

    # ---- changes -------------------------------------------------------------------------------

    def _add(self, records: Records) -> None:
        self._replace(records, [])

    def _update(self, records: Records) -> None:
        self._replace(records, [self._row_of[each] for each in records.ids.tolist()])

    def _remove(self, ids: Ids) -> None:
        self._replace(None, [self._row_of[each] for each in ids.tolist()])

    def _replace(self, records: Records | None, removed: list[int]) -> None:
        """Removes rows and appends records; on an error both are undone."""
        before = self._tail, self._alive
        alive = self._alive.copy()
        alive[removed] = False
        if records is not None:
            self._tail = records if self._tail is None else self._tail.joined(records)
            alive = np.concatenate([alive, np.ones(len(records), bool)])
        self._alive = alive
        try:
            self._update_caches()
        except BaseException:  # the engine could not be rebuilt
            self._tail, self._alive = before
            self._clear_caches()
            raise

    def compact(self) -> None:
        """Rebuilds the engine over all images that are not removed."""
        records = self.records()
        engine = self._build(records.vectors)
        self._base, self._tail, self._engine = records, None, engine
        self._alive = np.ones(len(records), bool)
        self._saved = None
        self._clear_caches()

    def _clear_caches(self) -> None:
        """Counts the rows and clears the cached properties."""
        self._count = int(self._alive.sum())
        self._all_alive = self._count == len(self._alive)
        for name in CACHED:
            vars(self).pop(name, None)

    def _update_caches(self) -> None:
        """Clears the caches, and rebuilds the engine after many changes."""
        self._clear_caches()
        added = 0 if self._tail is None else len(self._tail)
        changes = max(added, len(self._alive) - self._count)
        if changes > max(REBUILT_ROWS, REBUILT_SHARE * len(self._base)):
            self.compact()

    # ---- computed from the rows on first use ---------------------------------------------------

    @functools.cached_property
    def _ids(self) -> Ids:
        """Ids of all rows, followed by the id of a missing result (row -1)."""
        parts = [self._base.ids] if self._tail is None else [self._base.ids, self._tail.ids]
        text = self._base.ids.dtype.kind == "O"
        missing = np.array([None if text else PADDING], self._base.ids.dtype)
        return np.concatenate([*parts, missing])

    @functools.cached_property
    def _row_of(self) -> dict[Id, int]:
        """Id -> row, without removed rows."""
        alive = np.flatnonzero(self._alive)
        return dict(zip(self._ids[alive].tolist(), alive.tolist(), strict=True))

    @functools.cached_property
    def _names_and_labels(self) -> tuple[list[str], Int64[np.ndarray, "n"]]:
        parts = [self._base] if self._tail is None else [self._base, self._tail]
        names = np.concatenate([part.classes for part in parts])
        known = sorted(set(names[self._alive].tolist()))
        number = {name: i for i, name in enumerate(known)}
        return known, np.array([number.get(name, PADDING) for name in names], np.int64)

    @property
    def _labels(self) -> Int64[np.ndarray, "n"]:
        return self._names_and_labels[1]

    def _class_names(self) -> list[str]:
        return self._names_and_labels[0]

    def _check_classes(self, classes: Sequence[str]) -> None:
        known = self._class_names()
        for name in classes:
            if name not in known:
                close = nearest(name, known)
                raise UserError(f"classes: the index contains no class {name!r}{close}")

    def _id_type(self) -> np.dtype:
        return self._base.ids.dtype

    def _contains(self, ids: Ids) -> Bool[np.ndarray, "_"]:
        row_of = self._row_of
        return np.array([each in row_of for each in ids.tolist()], bool)

    def _entry(self, row: int) -> Entry:
        part, position = self._base, row
        if self._tail is not None and row >= len(self._base):
            part, position = self._tail, row - len(self._base)
        name = part.ids[position : position + 1].tolist()[0]
        return Entry(name, part.classes[position], part.paths[position])

    # ---- disk ----------------------------------------------------------------------------------

    def save(self, directory: Path | str | None = None) -> None:
        target = self._directory if directory is None else Path(directory).resolve()
        if target is None:
            raise UserError("the index was never saved, so save needs a directory")
        with staged(target) as stage:
            before = None
            if target == self._directory:
                refuse_if_changed(target, self._published)
                before = self._saved
            manifest, keep = self._written(stage, before)
            publish(stage, target, manifest, keep)
        self.opened(target, manifest)

    def opened(self, directory: Path, manifest: dict[str, Any]) -> None:
        self._directory, self._saved = directory.resolve(), manifest
        self.manifest = self._published = manifest

    def _written(
        self, stage: Path, before: dict[str, Any] | None
    ) -> tuple[dict[str, Any], list[str]]:
        """Writes new files; returns the manifest and the existing files that it names."""
        shards = before["shards"] if before else export.write_shards(stage, self._base)
        engine = (before or {}).get("engine") or {}
        if (engine.get("uri"), engine.get("rows")) != (self.uri, len(self._base)):
            engine = self.written_engine(stage)
        keep = [shard["file"] for shard in shards] + [engine.get("folder", "")]
        stored = sum(shard["rows"] for shard in shards)
        if self._tail is not None and stored < len(self._alive):
            new = self._tail.rows(slice(stored - len(self._base), None))
            shards = shards + export.write_shards(stage, new)
        removed = None if self._all_alive else self._write_removed(stage)
        origin = {n: v for n, v in self.manifest.items() if n not in OWN_FIELDS}
        full = origin | export.contents(shards, self.dimension, removed) | {"engine": engine}
        return full, keep

    def written_engine(self, stage: Path) -> dict[str, Any]:
        return {"uri": self.uri, "rows": len(self._base), **self._engine.write(stage)}

    def _write_removed(self, stage: Path) -> dict[str, Any]:
        draft = stage / "removed.npy"
        rows = np.flatnonzero(~self._alive)
        np.save(draft, rows)
        path, digest = named_by_content(draft, "removed", ".npy")
        return {"file": path.name, "rows": len(rows), "sha256": digest}
