"""`milvus://`: a distributed engine for galleries that outgrow one machine, behind the same client
as its embedded file.

    milvus://HOST:PORT?collection=gallery&index=SCANN     a server or cluster
    milvus://PATH/file.db?index=HNSW                      the embedded file

Vectors, ids, class names and paths live in a collection; the manifest lives beside the export and
names the collection, and both carry one mark, so that neither answers for another. Changes reach
the collection at once, in batches that are each whole or not at all.
"""

import contextlib
import copy
import importlib
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from afa.errors import UserError, choose
from afa.io import locked
from afa.manifest import OWN_FIELDS, publish, refuse_if_changed, staged
from afa.retrieval import export
from afa.retrieval.index.contract import Entry, Index, Results
from afa.retrieval.index.uri import FIELD, Address
from afa.retrieval.records import Id, Ids, Records, kind_of

MARK = "afa.identity"
LOCK = "LOCK"  # in the embedded file, which is a directory; its library holds a lock on it
_OPENED: set[Path] = set()  # embedded files that this process opened: the library keeps them open
TOKEN = "MILVUS_TOKEN"  # environment variable; a secret does not belong into an address
LIMIT = 16_384  # results of a query, of Milvus
BATCH = 1000  # rows, queries or ids in a request
LONGEST = {"id": 512, "class": 512, "path": 4096}  # bytes
OPTIONS: dict[str, type] = {
    "collection": str, "index": str, "secure": bool, "nlist": int, "nprobe": int, "m": int,
    "ef_construction": int, "ef": int,
}  # fmt: skip
INDEXES: dict[str, None] = dict.fromkeys(("SCANN", "HNSW", "IVF_FLAT", "FLAT"))
# What does not stand for itself in a text constant, of the server and of the embedded file alike.
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})
POINTS_A_CELL = 39  # k-means wants no fewer


class MilvusIndex(Index):
    """See `afa.retrieval.index`, which makes and opens one.

    Args:
      uri: the address.
      client: of the server or file.
      collection: which holds the gallery.
      manifest: who made the vectors.
      search: parameters of a search.
    """

    def __init__(
        self,
        uri: str,
        client: Any,
        collection: str,
        manifest: dict[str, Any],
        search: dict[str, Any],
    ) -> None:
        self.uri, self.manifest, self.collection = uri, manifest, collection
        self._client, self._parameters = client, search
        with _told(uri):
            found = client.describe_collection(collection)
            client.load_collection(collection)
        fields = {field["name"]: field for field in found["fields"]}
        self.dimension = int(fields["embedding"]["params"]["dim"])
        text = fields["id"]["type"].name == "VARCHAR"
        self._ids_are = np.dtype(object if text else np.int64)
        self._mark = found.get("properties", {}).get(MARK, "")
        self._home: Path | None = None
        self._published: dict[str, Any] = {}
        self._count = self._counted()

    @property
    def mark(self) -> str:
        """What binds a collection to a manifest."""
        return self._mark

    # ---- questions -----------------------------------------------------------------------------

    def __len__(self) -> int:
        """As of the last change of ours, or `info`: others may have changed it since."""
        return self._count

    def _counted(self) -> int:
        with _told(self.uri):
            found = self._client.query(self.collection, filter="", output_fields=["count(*)"])
        return int(found[0]["count(*)"])

    def lookup(self, ids: Sequence[Id]) -> list[Entry]:
        chosen = self._known(ids)
        found = {}
        for part in _batches(chosen.tolist()):
            for row in self._rows(f"id in {_literal(part)}", ["id", "class", "path"]):
                found[row["id"]] = Entry(row["id"], row["class"], row["path"])
        return [found[each] for each in chosen.tolist()]

    def info(self) -> dict[str, Any]:
        """uri, count, dimension, kind of ids, collection, and how it searches."""
        with _told(self.uri):
            names = self._client.list_indexes(self.collection)
            engine = self._client.describe_index(self.collection, names[0])
        self._count = self._counted()
        return {
            "uri": self.uri,
            "count": len(self),
            "dimension": self.dimension,
            "ids": kind_of(self._ids_are),
            "checkpoint": self.manifest.get("checkpoint"),
            "collection": self.collection,
            "engine": {"kind": engine["index_type"], **self._parameters.get("params", {})},
        }

    def _search(self, queries: np.ndarray, k: int, chosen: str | None) -> Results:
        if k > LIMIT:
            raise UserError(f"k={k} is above {LIMIT}, the most results that Milvus gives")
        parameters = copy.deepcopy(self._parameters)
        if "ef" in parameters["params"]:  # a list of candidates that is shorter is refused
            parameters["params"]["ef"] = max(k, parameters["params"]["ef"])
        nothing = None if self._ids_are.kind == "O" else -1
        ids = np.full((len(queries), k), nothing, self._ids_are)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for begin in range(0, len(queries), BATCH):
            block = queries[begin : begin + BATCH]
            for i, hits in enumerate(self._ask(block, k, chosen, parameters), start=begin):
                ids[i, : len(hits)] = [hit["id"] for hit in hits]
                scores[i, : len(hits)] = [hit["distance"] for hit in hits]
        return Results(ids, scores)

    def _range(
        self, queries: np.ndarray, score: float, chosen: str | None
    ) -> list[tuple[list[Id], np.ndarray]]:
        parameters = copy.deepcopy(self._parameters)
        # Milvus leaves out the lower bound itself, and wants an upper one.
        least = float(np.nextafter(np.float32(score), np.float32(-2)))
        parameters.setdefault("params", {}).update(radius=least, range_filter=2.0)
        if "ef" in parameters["params"]:
            parameters["params"]["ef"] = LIMIT
        found = []
        blocks = (queries[begin : begin + BATCH] for begin in range(0, len(queries), BATCH))
        for hits in (hits for b in blocks for hits in self._ask(b, LIMIT, chosen, parameters)):
            if len(hits) == LIMIT:
                raise UserError(
                    f"score={score}: a query has {LIMIT} results or more, the most that Milvus "
                    "gives; ask for a higher score"
                )
            scores = np.array([hit["distance"] for hit in hits], np.float32)
            found.append(([hit["id"] for hit in hits], scores))
        return found

    def _ask(
        self, queries: np.ndarray, k: int, chosen: str | None, parameters: dict[str, Any]
    ) -> Any:
        with _told(self.uri):
            return self._client.search(
                self.collection,
                data=list(queries),
                limit=k,
                filter=chosen or "",
                search_params=parameters,
                output_fields=["id"],
            )

    def _choose(self, classes: Sequence[str] | None, ids: Ids | None) -> str:
        conditions = []
        if classes is not None:
            conditions.append(f"class in {_literal(list(classes))}")
        if ids is not None:
            conditions.append(f"id in {_literal(ids.tolist())}")
        return " and ".join(conditions)

    def _check_classes(self, classes: Sequence[str]) -> None:
        for name in classes:
            if not self._rows(f"class == {_literal(name)}", ["id"], limit=1):
                raise UserError(f"classes: the index holds no class {name!r}")

    def _rows(self, condition: str, fields: list[str], limit: int | None = None) -> list[dict]:
        with _told(self.uri):
            more = {} if limit is None else {"limit": limit}
            return list(
                self._client.query(self.collection, filter=condition, output_fields=fields, **more)
            )

    def _id_type(self) -> np.dtype:
        return self._ids_are

    def _held(self, ids: Ids) -> Bool[np.ndarray, "_"]:
        there: set[Id] = set()
        for part in _batches(ids.tolist()):
            there |= {row["id"] for row in self._rows(f"id in {_literal(part)}", ["id"])}
        return np.array([each in there for each in ids.tolist()], bool)

    # ---- changes -------------------------------------------------------------------------------

    def _add(self, records: Records) -> None:
        self._write(self._client.insert, records)

    def _update(self, records: Records) -> None:
        self._write(self._client.upsert, records)

    def _remove(self, ids: Ids) -> None:
        self._note_change()
        for part in _batches(ids.tolist()):
            with _told(self.uri):  # `ids=` would be put into an expression without any escaping
                self._client.delete(self.collection, filter=f"id in {_literal(part)}")
        self._count = self._counted()
        left = self._held(ids)
        if left.any():
            raise UserError(f"{self.uri}: {ids[left.argmax()]!r} was not removed")

    def _write(self, write: Any, records: Records) -> None:
        _check_lengths(records)
        self._note_change()
        _send(self.uri, write, self.collection, records)
        self._count = self._counted()

    def _note_change(self) -> None:
        """Before the collection parts from the export: who reads the export must know."""
        if self._home is None or self.manifest["engine"].get("changed"):
            return
        manifest = copy.deepcopy(self.manifest)
        manifest["engine"]["changed"] = True
        self._publish(self._home, manifest)
        self.manifest = manifest

    # ---- disk ----------------------------------------------------------------------------------

    def save(self, directory: Path | str | None = None) -> None:
        with _told(self.uri):
            self._client.flush(self.collection)
        if directory is None or Path(directory).resolve() == self._home:
            if self._home is None:
                raise UserError("the index was never saved: save needs a directory")
            return  # what changed is in the collection already
        theirs = {name: v for name, v in self.manifest.items() if name not in OWN_FIELDS}
        engine = {"engine": self.written_engine(Path(directory)) | {"changed": True}}
        manifest = theirs | export.contents([], self.dimension) | engine
        self._publish(Path(directory), manifest)
        self.opened(Path(directory), manifest)

    def written_engine(self, stage: Path) -> dict[str, Any]:
        named = {"uri": self.uri, "collection": self.collection, "mark": self._mark}
        return named | {"changed": False}  # whether it holds something other than the export

    def opened(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Notes what is on disk."""
        self._home = directory.resolve()
        self.manifest = self._published = manifest

    def _publish(self, directory: Path, manifest: dict[str, Any]) -> None:
        with staged(directory) as stage:
            if directory == self._home:
                refuse_if_changed(directory, self._published)
            publish(stage, directory, manifest, [s["file"] for s in manifest["shards"]])
        self._published = manifest

    def drop(self) -> None:
        """Removes the collection."""
        with _told(self.uri):
            self._client.drop_collection(self.collection)

    def close(self) -> None:
        self._client.close()


def create(address: Address, records: Records, manifest: dict[str, Any]) -> MilvusIndex:
    """Makes a new collection and fills it.

    Raises:
      UserError: as `options`, no connection, or columns that are too long for it.
    """
    values = options(address)
    _check_lengths(records)
    kind, build, search = _plan(values, len(records), _embedded(address))
    client = _connect(address, values)
    name = f"{values.get('collection', 'afa')}_{uuid.uuid4().hex[:8]}"
    with _told(address.text):
        schema = _schema(client, records)
        index = client.prepare_index_params()
        index.add_index("embedding", index_type=kind, metric_type="IP", params=build)
        client.create_collection(
            name,
            schema=schema,
            index_params=index,
            consistency_level="Strong",
            properties={MARK: uuid.uuid4().hex},
        )
    try:
        _send(address.text, client.insert, name, records)
        with _told(address.text):
            client.flush(name)
        return MilvusIndex(address.text, client, name, manifest, search)
    except BaseException:
        client.drop_collection(name)
        raise


def read(address: Address, directory: Path, manifest: dict[str, Any]) -> MilvusIndex:
    """Opens the collection that a manifest names.

    Raises:
      UserError: no connection, no such collection, or one that another manifest made.
    """
    values, stored = options(address), manifest["engine"]
    client = _connect(address, values)
    with _told(address.text):
        if not client.has_collection(stored["collection"]):
            raise UserError(f"{address.text} holds no collection {stored['collection']!r}")
    search = _plan(values, 1, _embedded(address))[2]
    index = MilvusIndex(address.text, client, stored["collection"], manifest, search)
    if index.mark != stored["mark"]:
        raise UserError(
            f"{address.text}: collection {stored['collection']!r} is not the one {directory} was "
            "built with; build it again"
        )
    return index


def options(address: Address) -> dict[str, Any]:
    """What an address says.

    Raises:
      UserError: pymilvus is not installed, no place, an unknown option, or an index that is not
        there.
    """
    if not address.place:
        raise UserError(f"{FIELD}={address.text!r}: milvus:// needs HOST:PORT or PATH/file.db")
    values = address.read(OPTIONS)
    kind = values.get("index")
    if kind == "SCANN" and _embedded(address):
        raise UserError(
            f"{FIELD}={address.text!r}: the embedded file has no SCANN index (it would be accepted "
            "and fail later); take HNSW, IVF_FLAT or FLAT there, or a server"
        )
    if kind is not None:
        choose(f"{FIELD}: index", kind, INDEXES)
    _library()
    return values


# ---- helpers -----------------------------------------------------------------------------------


def _library() -> Any:
    try:
        return importlib.import_module("pymilvus")
    except ImportError as error:
        raise UserError(f"milvus:// cannot be used ({error}): pip install 'afa[milvus]'") from None


def _embedded(address: Address) -> bool:
    return address.place.endswith(".db")


def _connect(address: Address, values: dict[str, Any]) -> Any:
    library = _library()
    # It logs every refusal with its traceback; the refusal itself is told below.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    logging.getLogger("milvus_lite").setLevel(logging.CRITICAL)
    with _told(address.text):
        if _embedded(address):
            path = Path(address.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            _refuse_if_open_elsewhere(address, path)
            return library.MilvusClient(str(path))
        scheme = "https" if values.get("secure") else "http"
        return library.MilvusClient(f"{scheme}://{address.place}", token=os.environ.get(TOKEN, ""))


def _refuse_if_open_elsewhere(address: Address, path: Path) -> None:
    """The embedded file is of one process, and its library would only say that opening failed."""
    held = path / LOCK
    if path.absolute() in _OPENED or not held.is_file():
        _OPENED.add(path.absolute())
        return
    busy = (
        f"{address.text}: another process has this file open, and it takes one at a time: close it "
        "there, or use a server (milvus://HOST:PORT)"
    )
    with locked(held, busy):
        _OPENED.add(path.absolute())


def _plan(
    values: dict[str, Any], count: int, embedded: bool
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Kind of index, parameters to build it, and parameters to search it."""
    kind = values.get("index") or ("HNSW" if embedded else "SCANN")
    if kind == "HNSW":
        build = {"M": values.get("m", 16), "efConstruction": values.get("ef_construction", 200)}
        search = {"ef": values.get("ef", 128)}
    elif kind == "FLAT":
        build, search = {}, {}
    else:
        cells = max(1, min(round(4 * count**0.5), count // POINTS_A_CELL))
        build = {"nlist": values.get("nlist", cells)}
        search = {"nprobe": values.get("nprobe", 32)}
        if kind == "SCANN":
            build["with_raw_data"] = True
    return kind, build, {"metric_type": "IP", "params": search}


def _schema(client: Any, records: Records) -> Any:
    kinds = _library().DataType
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    if records.ids.dtype.kind == "O":
        schema.add_field("id", kinds.VARCHAR, is_primary=True, max_length=LONGEST["id"])
    else:
        schema.add_field("id", kinds.INT64, is_primary=True)
    schema.add_field("class", kinds.VARCHAR, max_length=LONGEST["class"])
    schema.add_field("path", kinds.VARCHAR, max_length=LONGEST["path"])
    schema.add_field("embedding", kinds.FLOAT_VECTOR, dim=records.vectors.shape[1])
    return schema


def _send(uri: str, write: Any, collection: str, records: Records) -> None:
    for begin in range(0, len(records), BATCH):
        part = records.rows(slice(begin, begin + BATCH))
        columns = zip(part.ids.tolist(), part.classes, part.paths, part.vectors, strict=True)
        names = ("id", "class", "path", "embedding")
        with _told(uri):
            write(collection, [dict(zip(names, row, strict=True)) for row in columns])


def _check_lengths(records: Records) -> None:
    columns = {"class": records.classes, "path": records.paths}
    if records.ids.dtype.kind == "O":
        columns["id"] = records.ids
    for name, column in columns.items():
        for word in column:
            if len(word.encode()) > LONGEST[name]:
                raise UserError(
                    f"{name}={word[:40]!r}... is longer than the {LONGEST[name]} bytes that "
                    "milvus:// keeps of it"
                )


def _batches(values: list[Any]) -> Iterator[list[Any]]:
    for begin in range(0, len(values), BATCH):
        yield values[begin : begin + BATCH]


def _literal(value: Id | list[Any]) -> str:
    """Ids and names as constants of an expression."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return f'"{value.translate(ESCAPES)}"' if isinstance(value, str) else str(value)


@contextlib.contextmanager
def _told(uri: str) -> Iterator[None]:
    """What goes wrong over there, in one line."""
    try:
        yield
    except (_library().MilvusException, OSError) as error:
        reason = getattr(error, "message", "") or str(error)
        first, *_ = [*reason.strip().splitlines(), type(error).__name__]
        raise UserError(f"{uri}: {first}") from error
