"""Indexes: one contract (`contract.Index`), and the engines that an address chooses among.

    index = create("scann://", records, manifest)     in memory
    index = build(directory, "scann://")              over an export, kept beside it
    index = load(directory)                           opens what was built or saved
    index.search(queries, k=10, classes=["mug"])
    index.add(records); index.remove(ids); index.save()

An engine is one file and one line of `ENGINES`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.retrieval import export, files
from afa.retrieval.index import exact, milvus, scann
from afa.retrieval.index.contract import DEFAULT_K, Entry, Index, Results
from afa.retrieval.index.local import Engine, LocalIndex, read_removed
from afa.retrieval.index.uri import FIELD, Address, parse
from afa.retrieval.records import Records

__all__ = [
    "DEFAULT_K", "Entry", "Index", "Results", "build", "check", "create", "default_uri", "load",
]  # fmt: skip


def _exact(address: Address, plan: dict[str, Any] | None) -> Callable[..., Engine]:
    values = exact.options(address)
    return lambda vectors: exact.ExactEngine(vectors, **values)


def _scann(address: Address, plan: dict[str, Any] | None) -> Callable[..., Engine]:
    values = scann.options(address)

    threads = values.pop("threads", 0)

    def build(vectors: Any) -> Engine:
        tuned = {} if plan is None else {n: v for n, v in plan.items() if n in scann.OPTIONS}
        return scann.ScannEngine.build(
            vectors, scann.planned(len(vectors), tuned | values), threads
        )

    return build


LOCAL = {"exact": _exact, "scann": _scann}
ENGINES: dict[str, Callable[[Address], Any]] = {
    "exact": exact.options,
    "scann": scann.options,
    "milvus": milvus.options,
}


def check(uri: str) -> Address:
    """Takes an address apart, and looks whether its engine can be used here.

    Raises:
      UserError: no such engine, options that it does not know, or a library that is missing.
    """
    address = parse(uri, ENGINES)
    ENGINES[address.scheme](address)
    return address


def default_uri() -> str:
    """ScaNN where it is installed, exact search elsewhere."""
    return "scann://" if scann.installed() else "exact://"


def create(
    uri: str,
    records: Records,
    manifest: dict[str, Any] | None = None,
    engine: scann.ScannEngine | None = None,
) -> Index:
    """An index over some pictures.

    Args:
      uri: which engine.
      records: the gallery.
      manifest: who made the vectors: `configuration`, `checkpoint`, `preprocessing`, and anything
        else worth keeping. Needed to save it.
      engine: of ScaNN, over these vectors, as it was tuned (`tuning.tune`); None builds one.

    Raises:
      UserError: as `check`, or no connection.
    """
    address = check(uri)
    manifest = manifest or {}
    if address.scheme == "milvus":
        return milvus.create(address, records, manifest)
    plan = None if engine is None else engine.info()
    build = LOCAL[address.scheme](address, plan)
    return LocalIndex(uri, build, records, manifest, engine, len(records))


def build(
    directory: Path | str, uri: str | None = None, engine: scann.ScannEngine | None = None
) -> Index:
    """Builds an index over an export, in its directory, replacing the one that is there.

    Args:
      directory: an export (`export.write_export`), or an index.
      uri: None is `default_uri()`.
      engine: as in `create`.

    Raises:
      UserError: no export, a damaged one, as `create`, or a full disk. What was there still is.
    """
    directory = Path(directory)
    uri = default_uri() if uri is None else uri
    check(uri)
    before = files.read_manifest(directory, "export")
    _refuse_elsewhere(directory, before)
    alive = read_removed(directory, before)
    everything = export.read_shards(directory, before)
    records = everything if alive.all() else everything.rows(alive)
    theirs = {name: value for name, value in before.items() if name not in export.OWN}
    export.check_manifest(theirs)
    began = time.perf_counter()
    index = create(uri, records, theirs, engine)
    seconds = time.perf_counter() - began
    with files.staged(directory) as stage:
        manifest, keep = before, [shard["file"] for shard in before["shards"]]
        if not alive.all():
            shards = export.write_shards(stage, records)
            manifest, keep = theirs | export.contents(shards, index.dimension), []
        written = index.written_engine(stage) | {"build_seconds": seconds}
        manifest = manifest | {"engine": written}
        files.publish(stage, directory, manifest, keep)
    _drop(before.get("engine"), directory)
    index.opened(directory, manifest)
    return index


def load(directory: Path | str, uri: str | None = None) -> Index:
    """Opens an index.

    Args:
      directory: where it was built or saved; it may have moved.
      uri: None is what was built; `exact://` compares with every row instead.

    Raises:
      UserError: no index, a damaged file, another engine than was built, a library that is missing,
        or no connection.
    """
    directory = Path(directory)
    while True:
        manifest = files.read_manifest(directory)
        try:
            return _opened(directory, manifest, uri)
        except UserError:
            if files.read_manifest(directory) == manifest:
                raise  # ... and not because another process just replaced what it names


def _opened(directory: Path, manifest: dict[str, Any], uri: str | None) -> Index:
    stored = manifest.get("engine")
    wanted = uri or (stored or {}).get("uri")
    if wanted is None:
        raise UserError(f"{directory} holds embeddings but no index; build one over them")
    address = check(wanted)
    if uri is not None and address.scheme == "exact":
        _refuse_elsewhere(directory, manifest)
        index: Any = _local(directory, manifest, uri, LOCAL["exact"](address, None), None)
    elif stored is None:
        raise UserError(f"{FIELD}={uri!r}: {directory} holds no index; build it with {uri}")
    elif parse(stored["uri"], ENGINES).scheme != address.scheme:
        raise UserError(
            f"{FIELD}={uri!r}: {directory} was built with {stored['uri']}; build it with {uri}"
        )
    elif address.scheme == "milvus":
        index = milvus.read(address, directory, manifest)
    else:
        plan = stored.get("plan")
        builder = LOCAL[address.scheme](address, plan)
        index = _local(directory, manifest, address.text, builder, stored)
    index.opened(directory, manifest)
    return index


def _local(
    directory: Path,
    manifest: dict[str, Any],
    uri: str,
    builder: Callable[..., Engine],
    stored: dict[str, Any] | None,
) -> LocalIndex:
    records = export.read_shards(directory, manifest)
    rows = stored["rows"] if stored else len(records)
    if stored and "folder" in stored:
        threads = scann.options(parse(uri, ENGINES)).get("threads", 0)
        engine: Engine = scann.read(directory, records.vectors[:rows], stored, threads)
    else:
        engine = builder(records.vectors[:rows])
    alive = read_removed(directory, manifest)
    return LocalIndex(uri, builder, records, manifest, engine, rows, alive)


def _refuse_elsewhere(directory: Path, manifest: dict[str, Any]) -> None:
    if (manifest.get("engine") or {}).get("changed"):
        raise UserError(
            f"{directory}: the gallery lives in {manifest['engine']['uri']} and was changed there; "
            "the embeddings beside it are older"
        )


def _drop(stored: dict[str, Any] | None, directory: Path) -> None:
    """The collection of an index that was replaced goes, where it can still be reached."""
    if not stored or "collection" not in stored:
        return
    address = check(stored["uri"])
    old = milvus.read(address, directory, {"engine": stored})
    old.drop()
    old.close()
