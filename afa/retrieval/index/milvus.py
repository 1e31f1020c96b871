"""`milvus://`: a distributed engine for galleries too large for one machine, or an embedded file
with the same client.

    milvus://HOST:PORT?collection=gallery&index=SCANN     a server or cluster
    milvus://PATH/file.db?index=HNSW                      the embedded file

Vectors, ids, class names and paths are in a collection. The manifest is stored with the export and
names the collection; both have the same random identifier (the mark), which is checked. Changes are
applied to the collection at once, in atomic batches.
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
from afa.retrieval.index.contract import Entry, Index, Results, Server
from afa.retrieval.index.uri import FIELD, Address
from afa.retrieval.records import Id, Ids, Records, kind_of

MARK = "afa.identity"
LOCK = "LOCK"  # locked by the library, in the embedded file, which is a directory
_OPENED: set[Path] = set()  # embedded files of this process; the library keeps them open
TOKEN = "MILVUS_TOKEN"  # environment variable; secrets do not belong in an address
# The library pings every ten seconds. The server of an embedded file, in this process, refuses so
# many: after about a minute without a search, gRPC closes the connection and prints two lines.
NO_PINGS = {"grpc.keepalive_time_ms": 2**31 - 1}
LIMIT = 16_384  # largest number of results per query in Milvus
BATCH = 1000  # rows, queries or ids per request
LONGEST = {"id": 512, "class": 512, "path": 4096}  # bytes
OPTIONS: dict[str, type] = {
    "collection": str, "index": str, "secure": bool, "nlist": int, "nprobe": int, "m": int,
    "ef_construction": int, "ef": int,
}  # fmt: skip
INDEXES: dict[str, None] = dict.fromkeys(("SCANN", "HNSW", "IVF_FLAT", "FLAT"))
# Escapes in text constants; the same for the server and the embedded file.
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})
POINTS_PER_CELL = 39  # at least this many for k-means


class MilvusIndex(Index):
    """An index in Milvus; built and opened by `afa.retrieval.index`.

    Args:
      uri: address of the server or file.
      client: its client.
      collection: name of the collection of the gallery.
      manifest: origin of the vectors.
      search: search parameters.
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
        with _user_errors(uri):
            description = client.describe_collection(collection)
            client.load_collection(collection)
        fields = {field["name"]: field for field in description["fields"]}
        self.dimension = int(fields["embedding"]["params"]["dim"])
        text = fields["id"]["type"].name == "VARCHAR"
        self._id_dtype = np.dtype(object if text else np.int64)
        self._mark = description.get("properties", {}).get(MARK, "")
        self._directory: Path | None = None
        self._published: dict[str, Any] = {}
        self._count = self._counted()

    @property
    def mark(self) -> str:
        """Random identifier that the collection and its manifest share."""
        return self._mark

    # ---- queries -------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of images at the last change by this client or call of `info`."""
        return self._count

    def _counted(self) -> int:
        with _user_errors(self.uri):
            rows = self._client.query(self.collection, filter="", output_fields=["count(*)"])
        return int(rows[0]["count(*)"])

    def lookup(self, ids: Sequence[Id]) -> list[Entry]:
        chosen = self._known(ids)
        entries = {}
        for part in _batches(chosen.tolist()):
            for row in self._rows(f"id in {_literal(part)}", ["id", "class", "path"]):
                entries[row["id"]] = Entry(row["id"], row["class"], row["path"])
        return [entries[each] for each in chosen.tolist()]

    def info(self) -> dict[str, Any]:
        """Returns uri, count, dimension, kind of ids, collection, and search settings."""
        with _user_errors(self.uri):
            names = self._client.list_indexes(self.collection)
            engine = self._client.describe_index(self.collection, names[0])
        self._count = self._counted()
        return {
            "uri": self.uri,
            "count": len(self),
            "dimension": self.dimension,
            "ids": kind_of(self._id_dtype),
            "checkpoint": self.manifest.get("checkpoint"),
            "collection": self.collection,
            "engine": {"kind": engine["index_type"], **self._parameters.get("params", {})},
        }

    def _search(self, queries: np.ndarray, k: int, chosen: str | None) -> Results:
        if k > LIMIT:
            raise UserError(f"k={k} is above {LIMIT}, the limit of Milvus")
        parameters = copy.deepcopy(self._parameters)
        if "ef" in parameters["params"]:  # Milvus requires ef >= k
            parameters["params"]["ef"] = max(k, parameters["params"]["ef"])
        missing = None if self._id_dtype.kind == "O" else -1
        ids = np.full((len(queries), k), missing, self._id_dtype)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for begin in range(0, len(queries), BATCH):
            block = queries[begin : begin + BATCH]
            for i, hits in enumerate(self._request(block, k, chosen, parameters), start=begin):
                ids[i, : len(hits)] = [hit["id"] for hit in hits]
                scores[i, : len(hits)] = [hit["distance"] for hit in hits]
        return Results(ids, scores)

    def _range(
        self, queries: np.ndarray, score: float, chosen: str | None
    ) -> list[tuple[list[Id], np.ndarray]]:
        parameters = copy.deepcopy(self._parameters)
        # In Milvus the lower bound is exclusive and an upper bound is required.
        least = float(np.nextafter(np.float32(score), np.float32(-2)))
        parameters.setdefault("params", {}).update(radius=least, range_filter=2.0)
        if "ef" in parameters["params"]:
            parameters["params"]["ef"] = LIMIT
        results = []
        blocks = (queries[begin : begin + BATCH] for begin in range(0, len(queries), BATCH))
        for hits in (hits for b in blocks for hits in self._request(b, LIMIT, chosen, parameters)):
            if len(hits) == LIMIT:
                raise UserError(
                    f"score={score}: a query has {LIMIT} results or more, the limit of Milvus; use "
                    "a higher score"
                )
            scores = np.array([hit["distance"] for hit in hits], np.float32)
            results.append(([hit["id"] for hit in hits], scores))
        return results

    def _request(
        self, queries: np.ndarray, k: int, chosen: str | None, parameters: dict[str, Any]
    ) -> Any:
        with _user_errors(self.uri):
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
                raise UserError(f"classes: the index contains no class {name!r}")

    def _rows(self, condition: str, fields: list[str], limit: int | None = None) -> list[dict]:
        with _user_errors(self.uri):
            more = {} if limit is None else {"limit": limit}
            return list(
                self._client.query(self.collection, filter=condition, output_fields=fields, **more)
            )

    def _id_type(self) -> np.dtype:
        return self._id_dtype

    def _contains(self, ids: Ids) -> Bool[np.ndarray, "_"]:
        known: set[Id] = set()
        for part in _batches(ids.tolist()):
            known |= {row["id"] for row in self._rows(f"id in {_literal(part)}", ["id"])}
        return np.array([each in known for each in ids.tolist()], bool)

    # ---- changes -------------------------------------------------------------------------------

    def _add(self, records: Records) -> None:
        self._write(self._client.insert, records)

    def _update(self, records: Records) -> None:
        self._write(self._client.upsert, records)

    def _remove(self, ids: Ids) -> None:
        self._mark_changed()
        for part in _batches(ids.tolist()):
            with _user_errors(self.uri):  # `ids=` would not be escaped
                self._client.delete(self.collection, filter=f"id in {_literal(part)}")
        self._count = self._counted()
        remaining = self._contains(ids)
        if remaining.any():
            raise UserError(f"{self.uri}: {ids[remaining.argmax()]!r} was not removed")

    def _write(self, write: Any, records: Records) -> None:
        _check_lengths(records)
        self._mark_changed()
        _send(self.uri, write, self.collection, records)
        self._count = self._counted()

    def _mark_changed(self) -> None:
        """Records in the manifest, before a change, that the collection differs from the export."""
        if self._directory is None or self.manifest["engine"].get("changed"):
            return
        manifest = copy.deepcopy(self.manifest)
        manifest["engine"]["changed"] = True
        self._publish(self._directory, manifest)
        self.manifest = manifest

    # ---- disk ----------------------------------------------------------------------------------

    def save(self, directory: Path | str | None = None) -> None:
        with _user_errors(self.uri):
            self._client.flush(self.collection)
        if directory is None or Path(directory).resolve() == self._directory:
            if self._directory is None:
                raise UserError("the index was never saved, so save needs a directory")
            return  # changes are already in the collection
        origin = {name: v for name, v in self.manifest.items() if name not in OWN_FIELDS}
        engine = {"engine": self.written_engine(Path(directory)) | {"changed": True}}
        manifest = origin | export.contents([], self.dimension) | engine
        self._publish(Path(directory), manifest)
        self.opened(Path(directory), manifest)

    def written_engine(self, stage: Path) -> dict[str, Any]:
        named = {"uri": self.uri, "collection": self.collection, "mark": self._mark}
        return named | {"changed": False}  # changed: differs from the export

    def opened(self, directory: Path, manifest: dict[str, Any]) -> None:
        self._directory = directory.resolve()
        self.manifest = self._published = manifest

    def _publish(self, directory: Path, manifest: dict[str, Any]) -> None:
        with staged(directory) as stage:
            if directory == self._directory:
                refuse_if_changed(directory, self._published)
            publish(stage, directory, manifest, [s["file"] for s in manifest["shards"]])
        self._published = manifest

    def drop(self) -> None:
        """Removes the collection."""
        with _user_errors(self.uri):
            self._client.drop_collection(self.collection)

    def close(self) -> None:
        self._client.close()


def create(address: Address, records: Records, manifest: dict[str, Any]) -> MilvusIndex:
    """Creates a collection and inserts the records.

    Raises:
      UserError: as `options`, no connection, or texts that are too long for its columns.
    """
    values = options(address)
    _check_lengths(records)
    kind, build, search = _plan(values, len(records), _embedded(address))
    client = _connect(address, values)
    name = f"{values.get('collection', 'afa')}_{uuid.uuid4().hex[:8]}"
    with _user_errors(address.text):
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
        with _user_errors(address.text):
            client.flush(name)
        return MilvusIndex(address.text, client, name, manifest, search)
    except BaseException:
        client.drop_collection(name)
        raise


def read(address: Address, directory: Path, manifest: dict[str, Any]) -> MilvusIndex:
    """Opens the collection that a manifest names.

    Raises:
      UserError: no connection, no such collection, or one that belongs to another manifest.
    """
    values, stored = options(address), manifest["engine"]
    client = _connect(address, values)
    with _user_errors(address.text):
        if not client.has_collection(stored["collection"]):
            raise UserError(f"{address.text} has no collection {stored['collection']!r}")
    search = _plan(values, 1, _embedded(address))[2]
    index = MilvusIndex(address.text, client, stored["collection"], manifest, search)
    if index.mark != stored["mark"]:
        raise UserError(
            f"{address.text}: collection {stored['collection']!r} is not the one {directory} was "
            "built with; build it again"
        )
    return index


def options(address: Address) -> dict[str, Any]:
    """Returns the options of an address.

    Raises:
      UserError: pymilvus is not installed, no location, or an unknown option or kind of index.
    """
    if not address.location:
        raise UserError(f"{FIELD}={address.text!r}: milvus:// needs HOST:PORT or PATH/file.db")
    values = address.read(OPTIONS)
    kind = values.get("index")
    if kind == "SCANN" and _embedded(address):
        raise UserError(
            f"{FIELD}={address.text!r}: the embedded file has no SCANN index (it would be accepted "
            "and fail later); use HNSW, IVF_FLAT or FLAT, or a server"
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
    return address.location.endswith(".db")


def _connect(address: Address, values: dict[str, Any]) -> Any:
    library = _library()
    # Errors are reported in one line below; the library would log them with a traceback.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    logging.getLogger("milvus_lite").setLevel(logging.CRITICAL)
    with _user_errors(address.text):
        if _embedded(address):
            path = Path(address.location)
            path.parent.mkdir(parents=True, exist_ok=True)
            _refuse_if_open_elsewhere(address, path)
            return library.MilvusClient(str(path), grpc_options=NO_PINGS)
        scheme = "https" if values.get("secure") else "http"
        return library.MilvusClient(
            f"{scheme}://{address.location}", token=os.environ.get(TOKEN, "")
        )


def _refuse_if_open_elsewhere(address: Address, path: Path) -> None:
    """Checks that no other process has the embedded file open; the library gives no reason."""
    lock = path / LOCK
    if path.absolute() in _OPENED or not lock.is_file():
        _OPENED.add(path.absolute())
        return
    busy = (
        f"{address.text}: another process has this file open, and only one at a time can: close it "
        "there, or use a server (milvus://HOST:PORT)"
    )
    with locked(lock, busy):
        _OPENED.add(path.absolute())


def _plan(
    values: dict[str, Any], count: int, embedded: bool
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Returns the kind of index, its build parameters, and its search parameters."""
    kind = values.get("index") or ("HNSW" if embedded else "SCANN")
    if kind == "HNSW":
        build = {"M": values.get("m", 16), "efConstruction": values.get("ef_construction", 200)}
        search = {"ef": values.get("ef", 128)}
    elif kind == "FLAT":
        build, search = {}, {}
    else:
        cells = max(1, min(round(4 * count**0.5), count // POINTS_PER_CELL))
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
        with _user_errors(uri):
            write(collection, [dict(zip(names, row, strict=True)) for row in columns])


def _check_lengths(records: Records) -> None:
    columns = {"class": records.classes, "path": records.paths}
    if records.ids.dtype.kind == "O":
        columns["id"] = records.ids
    for name, column in columns.items():
        for word in column:
            if len(word.encode()) > LONGEST[name]:
                raise UserError(
                    f"{name}={word[:40]!r}... is longer than {LONGEST[name]} bytes, the limit of "
                    "milvus://"
                )


def _batches(values: list[Any]) -> Iterator[list[Any]]:
    for begin in range(0, len(values), BATCH):
        yield values[begin : begin + BATCH]


def _literal(value: Id | list[Any]) -> str:
    """Formats ids and names as constants of a filter expression."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return f'"{value.translate(ESCAPES)}"' if isinstance(value, str) else str(value)


@contextlib.contextmanager
def _user_errors(uri: str) -> Iterator[None]:
    """Converts errors of Milvus to a `UserError` of one line."""
    try:
        yield
    except (_library().MilvusException, OSError) as error:
        reason = getattr(error, "message", "") or str(error)
        first, *_ = [*reason.strip().splitlines(), type(error).__name__]
        raise UserError(f"{uri}: {first}") from error


ENGINE = Server(options, create, read)
