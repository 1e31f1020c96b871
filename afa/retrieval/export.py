"""Embeddings on disk: Parquet shards and `index.json`, the manifest that says what they are.

The manifest is what makes an export exist. Shards are written aside, moved in under names of their
own, and then the manifest is replaced in one step; only after that the old shards go. Whenever the
process dies, the manifest names shards that are all there: the old ones or the new ones.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int, Int64

from afa import parallel
from afa.errors import UserError
from afa.retrieval.exact import check_unit

MANIFEST = "index.json"
FORMAT = 1
ROWS_PER_SHARD = 100_000
REQUIRED = ("configuration", "checkpoint", "preprocessing")
OWN = ("format", "count", "dimension", "sha256", "shards")
STAGE_PREFIX = ".writing-"
HASH_BYTES = 2**20


@dataclass(frozen=True)
class Embeddings:
    """One export, read back.

    Attributes:
      vectors: unit vectors.
      ids: name of each picture, unique.
      labels: class id of each picture.
      classes: class name of each picture.
      paths: where each picture lies.
      manifest: contents of `index.json`.
    """

    vectors: Float32[np.ndarray, "n d"]
    ids: tuple[str, ...]
    labels: Int64[np.ndarray, "n"]
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)


def write_embeddings(
    directory: Path | str,
    embeddings: Float32[np.ndarray, "n d"],
    ids: Sequence[str],
    labels: Int[np.ndarray, "n"],
    paths: Sequence[str],
    class_names: Sequence[str],
    manifest: dict[str, Any],
    rows_per_shard: int = ROWS_PER_SHARD,
) -> dict[str, Any]:
    """Writes an export, replacing the one that is there.

    Args:
      directory: made when missing; everything else in it stays.
      embeddings: unit vectors.
      ids: unique names.
      labels: class ids.
      paths: where each picture lies.
      class_names: name of each class id.
      manifest: `configuration`, `checkpoint` (its id), `preprocessing`, and anything else worth
        keeping, as JSON values.
      rows_per_shard: most rows in a Parquet file.

    Returns:
      The manifest as written: with `count`, `dimension`, `shards` (file, rows, sha256) and `sha256`
      over all of them, which is the identity of the export.

    Raises:
      UserError: nothing to export, vectors that are not finite or not of unit length, columns of
        different lengths, an id twice, a label without a name, a manifest that lacks a field or
        claims one of its own, or a disk that is full. The old export then stays as it was.
    """
    if not len(embeddings):
        raise UserError("there are no embeddings to export")
    check_unit("embeddings", embeddings)
    _check_columns(len(embeddings), ids, labels, paths, class_names)
    _check_manifest(manifest)
    directory = Path(directory)
    table = _table(embeddings, ids, labels, paths, class_names)
    with staged(directory) as stage:
        shards = []
        for part in parallel.local_blocks(len(embeddings), rows_per_shard):
            file = stage / "shard.parquet"
            _write_shard(table.slice(part.start, part.stop - part.start), file)
            digest = file_sha256(file)
            name = f"embeddings-{len(shards):05d}-{digest[:12]}.parquet"
            file.rename(stage / name)
            shards.append({"file": name, "rows": part.stop - part.start, "sha256": digest})
        digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
        own = (FORMAT, len(embeddings), embeddings.shape[1], digest, shards)
        full = manifest | dict(zip(OWN, own, strict=True))
        publish(stage, directory, full, "embeddings-*.parquet")
    return full


def read_embeddings(directory: Path | str) -> Embeddings:
    """Reads an export and checks it against its manifest.

    Raises:
      UserError: no manifest, a manifest of another format, or a shard that is missing, changed, or
        holds something other than the manifest says.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, "export")
    shards = manifest["shards"]
    for shard in shards:
        file = directory / shard["file"]
        if not file.is_file():
            raise UserError(f"{file} is missing, though {MANIFEST} names it; export again")
        if file_sha256(file) != shard["sha256"]:
            raise UserError(f"{file} is not the file {MANIFEST} names (sha256 differs)")
    table = pa.concat_tables([pq.read_table(directory / shard["file"]) for shard in shards])
    count, dimension = manifest["count"], manifest["dimension"]
    column = table.column("embedding").combine_chunks()
    if len(table) != count or column.type.list_size != dimension:
        found = f"{len(table)} x {column.type.list_size}"
        raise UserError(f"{directory} holds {found} values, {MANIFEST} says {count} x {dimension}")
    vectors = column.flatten().to_numpy().reshape(count, dimension)
    check_unit(str(directory), vectors)
    text = {name: tuple(table.column(name).to_pylist()) for name in ("id", "class", "path")}
    labels = table.column("label").to_numpy()
    return Embeddings(vectors, text["id"], labels, text["class"], text["path"], manifest)


# ---- files that replace others as a whole ------------------------------------------------------


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """An empty folder inside `directory` to write in; it is gone afterwards, also after an error.

    Remains of a writer that was killed are cleared away first.

    Raises:
      UserError: the disk is full or not writable.
    """
    stage = directory / f"{STAGE_PREFIX}{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{STAGE_PREFIX}*"):
            shutil.rmtree(left)
        stage.mkdir()
        yield stage
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {directory}: {reason}; what it held is unchanged") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, directory: Path, manifest: dict[str, Any], kind: str) -> None:
    """Moves what was staged into `directory`, makes `manifest` its manifest, removes the old.

    Args:
      kind: glob of the files (or folders) of this kind, new and old.
    """
    draft = stage / MANIFEST
    draft.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new = [path for path in stage.iterdir() if path != draft]
    for path in new:
        _move(path, directory / path.name)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(directory / MANIFEST)
    for old in directory.glob(kind):
        if old.name not in {path.name for path in new}:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def read_manifest(directory: Path, what: str) -> dict[str, Any]:
    """The manifest of an export or of an index.

    Raises:
      UserError: there is none, it is no JSON, or it is of another format.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} holds no finished {what}: {MANIFEST} is missing") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{path} has format {found}, this version reads format {FORMAT}")
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


# ---- helpers -----------------------------------------------------------------------------------


def _move(path: Path, target: Path) -> None:
    # A name carries the digest of the content, so a folder that is there already is the same one.
    if target.is_dir():
        shutil.rmtree(path)
    else:
        path.replace(target)


def _check_columns(
    rows: int,
    ids: Sequence[str],
    labels: Int[np.ndarray, "_"],
    paths: Sequence[str],
    class_names: Sequence[str],
) -> None:
    for name, column in (("ids", ids), ("labels", labels), ("paths", paths)):
        if len(column) != rows:
            raise UserError(f"{name} has {len(column)} entries for {rows} embeddings")
    if len(set(ids)) < rows:
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))
        raise UserError(f"ids must be unique, but {twice!r} stands there twice")
    outside = (labels < 0) | (labels >= len(class_names))
    if outside.any():
        label = labels[outside.argmax()]
        raise UserError(f"label {label} has no name among the {len(class_names)} class_names")


def _check_manifest(manifest: dict[str, Any]) -> None:
    missing = [name for name in REQUIRED if name not in manifest]
    if missing:
        raise UserError(f"the manifest lacks {', '.join(missing)}")
    claimed = [name for name in OWN if name in manifest]
    if claimed:
        raise UserError(f"the manifest must leave {', '.join(claimed)} to the export")


def _table(
    embeddings: Float32[np.ndarray, "n d"],
    ids: Sequence[str],
    labels: Int[np.ndarray, "n"],
    paths: Sequence[str],
    class_names: Sequence[str],
) -> pa.Table:
    flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
    columns = {
        "id": pa.array(ids, pa.string()),
        "label": pa.array(labels.astype(np.int64)),
        "class": pa.array([class_names[label] for label in labels], pa.string()),
        "path": pa.array(paths, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1]),
    }
    return pa.table(columns)


def _write_shard(rows: pa.Table, path: Path) -> None:
    # Dictionaries and compression cost time and save nothing on the bits of real-valued vectors.
    vectors = "embedding.list.element"
    names = [name for name in rows.column_names if name != "embedding"]
    columns: dict[str, Any] = {
        "use_dictionary": names,
        "compression": dict.fromkeys(names, "zstd") | {vectors: "none"},
    }
    pq.write_table(rows, path, **columns)
