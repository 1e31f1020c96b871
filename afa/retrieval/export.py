"""Embeddings on disk: Parquet shards and their manifest, `index.json`.

An export is written and replaced atomically (`afa.manifest`). An index over the same embeddings
adds its own files to the same manifest, so that embeddings and index stay consistent
(`afa.retrieval.index`).
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
    """Writes an export and replaces an existing one.

    Args:
      directory: created if missing; other files in it are kept.
      records: the gallery.
      manifest: JSON values: `configuration`, `checkpoint` (its id), `preprocessing`, and any other
        fields.
      rows_per_shard: most rows per Parquet file.

    Returns:
      The manifest as written, with `count`, `dimension`, `shards` (file, rows, sha256) and `sha256`
      over all shards, which identifies the export.

    Raises:
      UserError: the manifest lacks a required field or contains a reserved one, or the disk is
        full. The old export is then unchanged.
    """
    check_manifest(manifest)
    directory = Path(directory)
    with staged(directory) as stage:
        shards = write_shards(stage, records, rows_per_shard)
        full = manifest | contents(shards, records.vectors.shape[1])
        publish(stage, directory, full, ())
    return full


def read_export(directory: Path | str) -> tuple[Records, dict[str, Any]]:
    """Reads an export: the rows that are not removed, and its manifest.

    Raises:
      UserError: no manifest, a manifest of another format, or a shard that is missing or does not
        match the manifest.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, "export")
    alive = read_removed(directory, manifest)
    records = read_shards(directory, manifest)
    return (records if alive.all() else records.rows(alive)), manifest


def write_shards(
    stage: Path, records: Records, rows_per_shard: int = ROWS_PER_SHARD
) -> list[dict[str, Any]]:
    """Writes Parquet files into a staging folder; returns file, rows and sha256 of each."""
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
    """Returns the manifest fields of the embeddings, with a hash that identifies them."""
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
    """Reads the rows of all shards, including removed rows.

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
        raise UserError(
            f"{directory} holds {found} values, {MANIFEST} says {expected} x {dimension}"
        )
    vectors = column.flatten().to_numpy().reshape(expected, dimension)
    check_unit(str(directory), vectors)
    text = {name: table.column(name).to_numpy() for name in ("id", "label", "class", "path")}
    return Records(vectors, text["id"], text["label"], text["class"], text["path"])


def read_removed(directory: Path, manifest: dict[str, Any]) -> Bool[np.ndarray, "n"]:
    """Returns a mask of the rows of the shards that are not removed.

    Raises:
      UserError: the list of removed rows is missing, changed, or out of range.
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
        raise UserError(f"{path} does not match {MANIFEST}; build the index again")
    alive[rows] = False
    return alive


def check_manifest(manifest: dict[str, Any]) -> None:
    """Checks the fields of a manifest.

    Raises:
      UserError: a required field is missing, or a reserved one is present.
    """
    missing = [name for name in REQUIRED if name not in manifest]
    if missing:
        raise UserError(f"the manifest lacks {', '.join(missing)}")
    reserved = [name for name in OWN_FIELDS if name in manifest]
    if reserved:
        raise UserError(
            f"the manifest must not contain {', '.join(reserved)}: the export writes these fields"
        )


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
    # Dictionary encoding and compression take time and save no space for real-valued vectors.
    vectors = "embedding.list.element"
    names = [name for name in rows.column_names if name != "embedding"]
    columns: dict[str, Any] = {
        "use_dictionary": names,
        "compression": dict.fromkeys(names, "zstd") | {vectors: "none"},
    }
    pq.write_table(rows, path, **columns)
