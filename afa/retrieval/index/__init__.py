"""Indexes: one interface (`contract.Index`) and several engines, chosen by an address.

    index = create("scann://", records, manifest)     in memory
    index = build(directory, "scann://")              of an export, stored in its directory
    index = load(directory)                           a built or saved index
    index.search(queries, k=10, classes=["mug"])
    index.add(records); index.remove(ids); index.save()

An engine is one file and one line in `ENGINES`.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.manifest import MANIFEST, OWN_FIELDS, publish, read_manifest, refuse_if_changed, staged
from afa.retrieval import export
from afa.retrieval.index import exact, milvus, scann
from afa.retrieval.index.contract import DEFAULT_K, Entry, Index, Results, Server
from afa.retrieval.index.local import InProcess, LocalIndex
from afa.retrieval.index.uri import FIELD, Address, parse
from afa.retrieval.records import Records

__all__ = [
    "DEFAULT_K", "Entry", "Index", "Results", "build", "check", "create", "default_uri", "load",
]  # fmt: skip


ENGINES: dict[str, InProcess | Server] = {
    "exact": exact.ENGINE,
    "scann": scann.ENGINE,
    "milvus": milvus.ENGINE,
}


def check(uri: str) -> Address:
    """Parses an address and checks that its engine can be used.

    Raises:
      UserError: unknown engine or option, or a missing library.
    """
    address = parse(uri, ENGINES)
    ENGINES[address.scheme].options(address)
    return address


def default_uri() -> str:
    """Returns the address of ScaNN if it is installed, otherwise of exact search."""
    return "scann://" if scann.installed() else "exact://"


def create(
    uri: str,
    records: Records,
    manifest: dict[str, Any] | None = None,
    engine: scann.ScannEngine | None = None,
) -> Index:
    """Builds an index in memory.

    Args:
      uri: address of the engine.
      records: the gallery.
      manifest: origin of the vectors: `configuration`, `checkpoint`, `preprocessing`, and any other
        fields. Required by `Index.save`.
      engine: tuned ScaNN engine of these vectors (`tuning.tune`); None to build one.

    Raises:
      UserError: as `check`, or no connection.
    """
    address = check(uri)
    manifest = manifest or {}
    kind = ENGINES[address.scheme]
    if isinstance(kind, Server):
        return kind.create(address, records, manifest)
    if engine is not None and engine.rows != len(records):
        raise ValueError(f"the engine has {engine.rows} rows, not {len(records)}")
    build = kind.builder(address, None if engine is None else engine.info())
    return LocalIndex(uri, build, records, manifest, engine, len(records))


def build(
    directory: Path | str,
    uri: str | None = None,
    engine: scann.ScannEngine | None = None,
    records: Records | None = None,
    manifest: dict[str, Any] | None = None,
) -> Index:
    """Builds an index in a directory and replaces an existing one atomically.

    Args:
      directory: an export (`export.write_export`) or an index; created if `records` are given.
      uri: address of the engine; None for `default_uri()`.
      engine: as in `create`.
      records: the gallery; None for the embeddings in the directory.
      manifest: of `records`, as in `create`.

    Raises:
      UserError: as `create`, no export, a damaged export, a full disk, or a directory that another
        process changed meanwhile. The old contents are then unchanged.
    """
    directory = Path(directory)
    uri = default_uri() if uri is None else uri
    check(uri)
    before = _current_manifest(directory, records)
    keep: list[dict[str, Any]] = []  # shards that are kept
    if records is None:
        _refuse_outdated(directory, before)
        records, _ = export.read_export(directory)
        manifest = {name: value for name, value in before.items() if name not in OWN_FIELDS}
        keep = before["shards"] if before["removed"] is None else []
    assert manifest is not None
    export.check_manifest(manifest)
    began = time.perf_counter()
    index = create(uri, records, manifest, engine)
    seconds = time.perf_counter() - began
    try:
        with staged(directory) as stage:
            if before:
                refuse_if_changed(directory, before)
            shards = keep or export.write_shards(stage, records)
            written = index.written_engine(stage) | {"build_seconds": seconds}
            full = manifest | export.contents(shards, index.dimension) | {"engine": written}
            publish(stage, directory, full, [shard["file"] for shard in keep])
    except BaseException:
        _drop(index, uri)
        raise
    index.opened(directory, full)
    _drop_replaced(before.get("engine"), directory)
    return index


def load(directory: Path | str, uri: str | None = None) -> Index:
    """Opens an index.

    Args:
      directory: of the index; it may have been moved.
      uri: `exact://` to search the embeddings exactly; None for the engine it was built with.

    Raises:
      UserError: no index, a damaged file, another engine than it was built with, a missing library,
        or no connection.

    >>> import tempfile
    >>> import numpy as np
    >>> import afa
    >>> from afa.retrieval.index import build
    >>> from afa.retrieval.records import Records
    >>> made_by = {"configuration": {}, "checkpoint": "none", "preprocessing": {}}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     vectors = np.eye(3, dtype=np.float32)
    ...     _ = build(directory, "exact://", None, Records.of(vectors, ["a", "b", "c"]), made_by)
    ...     results = afa.open_index(directory).search(vectors[1:2], k=1)
    >>> results.ids.tolist(), results.scores.tolist()
    ([['b']], [[1.0]])
    """
    directory = Path(directory)
    while True:
        manifest = read_manifest(directory)
        try:
            return _opened(directory, manifest, uri)
        except (UserError, OSError, RuntimeError) as error:
            if read_manifest(directory) != manifest:
                continue  # another process has just replaced the files
            if isinstance(error, UserError):
                raise
            raise UserError(f"{directory}: cannot be opened ({error})") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            path, reason = directory / MANIFEST, f"{type(error).__name__}: {error}"
            reason = reason.partition("\n")[0]
            raise UserError(f"{path} is damaged ({reason}); build it again") from error


def _opened(directory: Path, manifest: dict[str, Any], uri: str | None) -> Index:
    stored = manifest.get("engine")
    chosen = uri or (stored or {}).get("uri")
    if chosen is None:
        raise UserError(f"{directory} has embeddings but no index; build one")
    address = check(chosen)
    kind = ENGINES[address.scheme]
    if uri is not None and address.scheme == "exact":
        _refuse_outdated(directory, manifest)
        index: Any = _in_process(directory, manifest, address, exact.ENGINE, None)
    elif stored is None:
        raise UserError(f"{FIELD}={uri!r}: {directory} has no index; build it with {uri}")
    elif parse(stored["uri"], ENGINES).scheme != address.scheme:
        raise UserError(
            f"{FIELD}={uri!r}: {directory} was built with {stored['uri']}; build it with {uri}"
        )
    elif isinstance(kind, Server):
        index = kind.read(address, directory, manifest)
    else:
        index = _in_process(directory, manifest, address, kind, stored)
    index.opened(directory, manifest)
    return index


def _in_process(
    directory: Path,
    manifest: dict[str, Any],
    address: Address,
    kind: InProcess,
    stored: dict[str, Any] | None,
) -> LocalIndex:
    records = export.read_shards(directory, manifest)
    rows = stored["rows"] if stored else len(records)
    builder = kind.builder(address, stored.get("plan") if stored else None)
    if stored and "folder" in stored and kind.read is not None:
        engine = kind.read(directory, records.vectors[:rows], stored, address)
    else:
        engine = builder(records.vectors[:rows])
    alive = export.read_removed(directory, manifest)
    return LocalIndex(address.text, builder, records, manifest, engine, rows, alive)


def _current_manifest(directory: Path, records: Records | None) -> dict[str, Any]:
    """Returns the manifest in the directory; {} if there is none and `records` are given."""
    if records is not None and not (directory / MANIFEST).exists():
        return {}
    return read_manifest(directory, "export")


def _refuse_outdated(directory: Path, manifest: dict[str, Any]) -> None:
    """Checks that the Parquet embeddings are those of the Milvus collection."""
    if (manifest.get("engine") or {}).get("changed"):
        raise UserError(
            f"{directory}: the gallery is in {manifest['engine']['uri']} and was changed there; "
            "the embeddings in this directory are older"
        )


def _drop_replaced(stored: dict[str, Any] | None, directory: Path) -> None:
    """Removes a replaced index from its server if it can be reached."""
    if not stored:
        return
    with contextlib.suppress(UserError):
        address = parse(stored["uri"], ENGINES)
        kind = ENGINES[address.scheme]
        if isinstance(kind, Server):
            _drop(kind.read(address, directory, {"engine": stored}), stored["uri"])


def _drop(index: Any, uri: str) -> None:
    """Removes an index from its server; one in this process needs no removal."""
    if isinstance(ENGINES[parse(uri, ENGINES).scheme], Server):
        index.drop()
        index.close()
