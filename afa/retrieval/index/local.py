"""An index on this machine: rows in memory, an engine over most of them, the newest beside it.

No engine here can change what it was built over without risk (a failed ScaNN upsert leaves its ids
changed), so none is asked to. Rows that are added stand in a tail that is compared row by row;
rows that are removed are passed over; when either grows past a share of the whole, the engine is
built again over what is left.
"""

import abc
import functools
from collections.abc import Callable, Sequence
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
from afa.retrieval.records import Id, Ids, Records, kind_of

REBUILT_SHARE = 0.2  # of the rows: added or removed
REBUILT_ROWS = 1000  # ... and no less than this


Allowed = Bool[np.ndarray, "n"] | None  # rows that may be found; None is all
Found = tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]  # rows and similarities
Near = tuple[Int64[np.ndarray, "m"], Float32[np.ndarray, "m"]]  # the same of one query


class Engine(abc.ABC):
    """What answers over fixed rows."""

    @abc.abstractmethod
    def search(self, queries: Float32[np.ndarray, "q d"], k: int, allowed: Allowed) -> Found:
        """Rows and similarities, best first; -1 and -inf where there are fewer than k."""

    @abc.abstractmethod
    def within(
        self, queries: Float32[np.ndarray, "q d"], score: float, allowed: Allowed
    ) -> list[Near]:
        """Rows at least this similar and their similarities, in any order."""

    @abc.abstractmethod
    def info(self) -> dict[str, Any]:
        """How it searches, as JSON values: kept in the manifest, and enough to open it again."""

    @abc.abstractmethod
    def write(self, stage: Path) -> dict[str, Any]:
        """Writes what it does not want to build again; returns what `read` needs to know."""


DERIVED = ("_ids", "_places", "_names_and_labels")  # of an index; see there
Builder = Callable[[Float32[np.ndarray, "n d"]], Engine]


class LocalIndex(Index):
    """See `afa.retrieval.index`, which makes and opens one.

    Args:
      uri: of the engine.
      build: makes the engine over some rows.
      records: all rows, removed ones too; the engine stands over the first of them.
      manifest: who made the vectors.
      engine: over the first rows; None builds it over all.
      built: rows that `engine` stands over.
      alive: rows that are not removed; None is all.
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
        self._home: Path | None = None
        self._saved: dict[str, Any] | None = None  # what of the files there can stay
        self._published: dict[str, Any] = {}
        self._changed()

    # ---- questions -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._count

    def records(self) -> Records:
        """Every image that can be found."""
        everything = self._base if self._tail is None else self._base.joined(self._tail)
        return everything if self._whole else everything.rows(self._alive)

    def lookup(self, ids: Sequence[Id]) -> list[Entry]:
        rows = [self._places[each] for each in self._known(ids).tolist()]
        return [self._entry(row) for row in rows]

    def info(self) -> dict[str, Any]:
        """uri, count, dimension, kind of ids, rows beside the engine and removed, and how the
        engine searches."""
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
        if chosen is None and self._whole and self._tail is None:
            rows, scores = self._engine.search(queries, k, None)
        else:
            rows, scores = self._search_parts(queries, k, chosen)
        return Results(self._ids[rows], scores)

    def _search_parts(
        self, queries: np.ndarray, k: int, chosen: Bool[np.ndarray, "n"] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        base, tail = self._allowed(chosen)
        found = self._engine.search(queries, min(k, len(self._base)), base)
        if self._tail is not None:
            rows, scores = flat.topk(queries, self._tail.vectors, min(k, len(self._tail)), tail)
            rows = np.where(rows == PADDING, PADDING, rows + len(self._base))
            found = flat.merged(found, (rows, scores), k)
        missing = ((0, 0), (0, k - found[0].shape[1]))
        rows = np.pad(found[0], missing, constant_values=PADDING)
        return rows, np.pad(found[1], missing, constant_values=-np.inf)

    def _range(
        self, queries: np.ndarray, score: float, chosen: Bool[np.ndarray, "n"] | None
    ) -> list[tuple[list[Id], np.ndarray]]:
        base, tail = self._allowed(chosen)
        found = []
        for query, part in zip(queries, self._engine.within(queries, score, base), strict=True):
            rows, scores = part
            if self._tail is not None:
                more, beside = flat.within(query, self._tail.vectors, score, tail)
                rows = np.concatenate([rows, more + len(self._base)])
                scores = np.concatenate([scores, beside])
            order = np.argsort(-scores, kind="stable")
            found.append((self._ids[rows[order]].tolist(), scores[order]))
        return found

    def _allowed(
        self, chosen: Bool[np.ndarray, "n"] | None
    ) -> tuple[Bool[np.ndarray, "b"] | None, Bool[np.ndarray, "t"] | None]:
        """What may be found among the engine's rows and beside them; None is all."""
        if chosen is None and self._whole:
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
            places = self._places
            listed[[places[each] for each in ids.tolist() if each in places]] = True
            chosen &= listed
        return chosen

    # ---- changes -------------------------------------------------------------------------------

    def _add(self, records: Records) -> None:
        self._replace(records, [])

    def _update(self, records: Records) -> None:
        self._replace(records, [self._places[each] for each in records.ids.tolist()])

    def _remove(self, ids: Ids) -> None:
        self._replace(None, [self._places[each] for each in ids.tolist()])

    def _replace(self, records: Records | None, gone: list[int]) -> None:
        before = self._tail, self._alive
        alive = self._alive.copy()
        alive[gone] = False
        if records is not None:
            self._tail = records if self._tail is None else self._tail.joined(records)
            alive = np.concatenate([alive, np.ones(len(records), bool)])
        self._alive = alive
        try:
            self._changed()
        except BaseException:  # the engine could not be built again
            self._tail, self._alive = before
            self._note()
            raise

    def compact(self) -> None:
        """Builds the engine again over every image that can be found."""
        records = self.records()
        engine = self._build(records.vectors)
        self._base, self._tail, self._engine = records, None, engine
        self._alive = np.ones(len(records), bool)
        self._saved = None
        self._note()

    def _note(self) -> None:
        """What follows from the rows is made anew when it is needed."""
        self._count = int(self._alive.sum())
        self._whole = self._count == len(self._alive)
        for name in DERIVED:
            vars(self).pop(name, None)

    def _changed(self) -> None:
        self._note()
        beside = 0 if self._tail is None else len(self._tail)
        moved = max(beside, len(self._alive) - self._count)
        if moved > max(REBUILT_ROWS, REBUILT_SHARE * len(self._base)):
            self.compact()

    # ---- what follows from the rows, made when it is first needed ------------------------------

    @functools.cached_property
    def _ids(self) -> Ids:
        """Ids of all rows, and one more, which row -1 takes: no result."""
        parts = [self._base.ids] if self._tail is None else [self._base.ids, self._tail.ids]
        text = self._base.ids.dtype.kind == "O"
        nothing = np.array([None if text else PADDING], self._base.ids.dtype)
        return np.concatenate([*parts, nothing])

    @functools.cached_property
    def _places(self) -> dict[Id, int]:
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
                raise UserError(f"classes: the index holds no class {name!r}{close}")

    def _id_type(self) -> np.dtype:
        return self._base.ids.dtype

    def _held(self, ids: Ids) -> Bool[np.ndarray, "_"]:
        places = self._places
        return np.array([each in places for each in ids.tolist()], bool)

    def _entry(self, row: int) -> Entry:
        part, place = self._base, row
        if self._tail is not None and row >= len(self._base):
            part, place = self._tail, row - len(self._base)
        name = part.ids[place : place + 1].tolist()[0]
        return Entry(name, part.classes[place], part.paths[place])

    # ---- disk ----------------------------------------------------------------------------------

    def save(self, directory: Path | str | None = None) -> None:
        target = self._home if directory is None else Path(directory).resolve()
        if target is None:
            raise UserError("the index was never saved: save needs a directory")
        with staged(target) as stage:
            before = None
            if target == self._home:
                refuse_if_changed(target, self._published)
                before = self._saved
            manifest, keep = self._written(stage, before)
            publish(stage, target, manifest, keep)
        self.opened(target, manifest)

    def opened(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Notes what is on disk."""
        self._home, self._saved = directory.resolve(), manifest
        self.manifest = self._published = manifest

    def _written(
        self, stage: Path, before: dict[str, Any] | None
    ) -> tuple[dict[str, Any], list[str]]:
        """Writes what is not there yet; returns the manifest and what it names of what is there."""
        shards = before["shards"] if before else export.write_shards(stage, self._base)
        engine = (before or {}).get("engine") or {}
        if (engine.get("uri"), engine.get("rows")) != (self.uri, len(self._base)):
            engine = self.written_engine(stage)
        keep = [shard["file"] for shard in shards] + [engine.get("folder", "")]
        stored = sum(shard["rows"] for shard in shards)
        if self._tail is not None and stored < len(self._alive):
            new = self._tail.rows(slice(stored - len(self._base), None))
            shards = shards + export.write_shards(stage, new)
        removed = None if self._whole else self._write_removed(stage)
        theirs = {n: v for n, v in self.manifest.items() if n not in OWN_FIELDS}
        full = theirs | export.contents(shards, self.dimension, removed) | {"engine": engine}
        return full, keep

    def written_engine(self, stage: Path) -> dict[str, Any]:
        """Writes the engine into a staged folder; returns what a manifest says of it."""
        return {"uri": self.uri, "rows": len(self._base), **self._engine.write(stage)}

    def _write_removed(self, stage: Path) -> dict[str, Any]:
        draft = stage / "removed.npy"
        rows = np.flatnonzero(~self._alive)
        np.save(draft, rows)
        path, digest = named_by_content(draft, "removed", ".npy")
        return {"file": path.name, "rows": len(rows), "sha256": digest}
