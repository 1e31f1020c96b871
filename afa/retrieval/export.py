"""Embeddings on disk: Parquet shards and `index.json`, the manifest that says what they are.

Written and replaced as a whole (`afa.manifest`). An index over the same embeddings adds its
own files and names them in the same manifest, so that they cannot part (`afa.retrieval.index`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool

from afa import parallel
from afa.errors import UserError
from afa.io import joint_sha256
from afa.manifest import (
    FORMAT,
    MANIFEST,
    OWN_FIELDS,
    check_file,
    named_by_content,
    publish,
    read_manifest,
    staged,
)
from afa.retrieval.exact import check_unit
from afa.retrieval.records import Records

ROWS_PER_SHARD = 100_000
REQUIRED = ("configuration", "checkpoint", "preprocessing")


def write_export(
    directory: Path | str,
    records: Records,
    manifest: dict[str, Any],
    rows_per_shard: int = ROWS_PER_SHARD,
) -> dict[str, Any]:
    """Writes an export, replacing the one that is there.

    Args:
      directory: made when missing; everything else in it stays.
      records: what is exported.
      manifest: `configuration`, `checkpoint` (its id), `preprocessing`, and anything else worth
        keeping, as JSON values.
      rows_per_shard: most rows in a Parquet file.

    Returns:
      The manifest as written: with `count`, `dimension`, `shards` (file, rows, sha256) and `sha256`
      over all of them, which is the identity of the export.

    Raises:
      UserError: a manifest that lacks a field or claims one of its own, or a disk that is full. The
        old export then stays as it was.
    """
    check_manifest(manifest)
    directory = Path(directory)
    with staged(directory) as stage:
        shards = write_shards(stage, records, rows_per_shard)
        full = manifest | contents(shards, records.vectors.shape[1])
        publish(stage, directory, full, ())
    return full


def read_export(directory: Path | str) -> tuple[Records, dict[str, Any]]:
    """Reads the images of an export that are not removed, and its manifest, and checks one
    against the other.

    Raises:
      UserError: no manifest, a manifest of another format, or a shard that is missing, changed, or
        holds something other than the manifest says.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, "export")
    alive = read_removed(directory, manifest)
    everything = read_shards(directory, manifest)
    return (everything if alive.all() else everything.rows(alive)), manifest


def write_shards(
    stage: Path, records: Records, rows_per_shard: int = ROWS_PER_SHARD
) -> list[dict[str, Any]]:
    """Writes Parquet files into a staged folder; returns file, rows and sha256 of each."""
    table = _table(records)
    shards = []
    for part in parallel.local_blocks(len(records), rows_per_shard):
        draft = stage / "shard.parquet"
        _write_shard(table.slice(part.start, part.stop - part.start), draft)
        path, digest = named_by_content(draft, "embeddings", ".parquet")
        shards.append({"file": path.name, "rows": part.stop - part.start, "sha256": digest})
    return shards


def contents(
    shards: list[dict[str, Any]], dimension: int, removed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a manifest says of the embeddings, with the identity of all of it."""
    parts = [shard["sha256"] for shard in shards] + ([removed["sha256"]] if removed else [])
    count = sum(shard["rows"] for shard in shards) - (removed["rows"] if removed else 0)
    return {
        "format": FORMAT,
        "count": count,
        "dimension": dimension,
        "sha256": joint_sha256(parts),
        "shards": shards,
        "removed": removed,
    }


def read_shards(directory: Path, manifest: dict[str, Any]) -> Records:
    """The rows of all shards, removed ones too.

    Raises:
      UserError: as `read_export`.
    """
    shards, dimension = manifest["shards"], manifest["dimension"]
    for shard in shards:
        check_file(directory / shard["file"], shard["sha256"])
    table = pa.concat_tables([pq.read_table(directory / shard["file"]) for shard in shards])
    expected = sum(shard["rows"] for shard in shards)
    column = table.column("embedding").combine_chunks()
    if len(table) != expected or column.type.list_size != dimension:
        found = f"{len(table)} x {column.type.list_size}"
        wanted = f"{expected} x {dimension}"
        raise UserError(f"{directory} holds {found} values, {MANIFEST} says {wanted}")
    vectors = column.flatten().to_numpy().reshape(expected, dimension)
    check_unit(str(directory), vectors)
    text = {name: table.column(name).to_numpy() for name in ("id", "label", "class", "path")}
    return Records(vectors, text["id"], text["label"], text["class"], text["path"])


def read_removed(directory: Path, manifest: dict[str, Any]) -> Bool[np.ndarray, "n"]:
    """Which rows of the shards can be found.

    Raises:
      UserError: the list of removed rows is missing, changed, or names rows that there are not.
    """
    alive = np.ones(sum(shard["rows"] for shard in manifest["shards"]), bool)
    removed = manifest.get("removed")
    if removed is None:
        return alive
    path = directory / removed["file"]
    check_file(path, removed["sha256"])
    rows = np.load(path, allow_pickle=False)
    inside = np.all((rows >= 0) & (rows < len(alive)))
    if len(rows) != removed["rows"] or not inside:
        raise UserError(f"{path} does not fit to {MANIFEST}; build the index again")
    alive[rows] = False
    return alive


def check_manifest(manifest: dict[str, Any]) -> None:
    """Refuses a manifest that does not say what made the embeddings.

    Raises:
      UserError: a field is missing, or one that is not the caller's is there.
    """
    missing = [name for name in REQUIRED if name not in manifest]
    if missing:
        raise UserError(f"the manifest lacks {', '.join(missing)}")
    claimed = [name for name in OWN_FIELDS if name in manifest]
    if claimed:
        raise UserError(f"the manifest must leave {', '.join(claimed)} to the export")


def _table(records: Records) -> pa.Table:
    flat = pa.array(np.ascontiguousarray(records.vectors).reshape(-1))
    text = records.ids.dtype == object
    columns = {
        "id": pa.array(records.ids, pa.string() if text else pa.int64()),
        "label": pa.array(records.labels),
        "class": pa.array(records.classes, pa.string()),
        "path": pa.array(records.paths, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, records.vectors.shape[1]),
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
