"""Exports: written data is read back, and a failure leaves the old export unchanged."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paths import ROOT, SUPPORT

from afa.errors import UserError
from afa.manifest import STAGE_PREFIX, staged
from afa.retrieval import export
from afa.retrieval.exact import normalise
from afa.retrieval.records import Records

MANIFEST = {"configuration": {"a": 1}, "checkpoint": "step-5", "preprocessing": {"size": 64}}
ROWS, DIMENSION = 25, 6


def columns(rows=ROWS, seed=0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "vectors": normalise(random.normal(size=(rows, DIMENSION)).astype(np.float32)),
        "ids": [f"é/{i}" for i in range(rows)],
        "classes": [("cup", "jug", "pot")[i % 3] for i in range(rows)],
        "paths": [f"images/{i}.jpg" for i in range(rows)],
        "labels": np.arange(rows) % 3 + 4,
    }


def write(directory, manifest=MANIFEST, rows_per_shard=10, **changes):
    records = Records.of(**columns() | changes)
    return export.write_export(directory, records, manifest, rows_per_shard)


def numbered(directory, **changes):
    """As `records`, with integer ids."""
    return write(directory, ids=np.arange(ROWS) * 3, **changes)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    written = write(tmp_path / "new" / "embeddings")
    read, manifest = export.read_export(tmp_path / "new" / "embeddings")
    given = columns()
    np.testing.assert_array_equal(read.vectors, given["vectors"])
    assert read.vectors.dtype == np.float32
    np.testing.assert_array_equal(read.labels, given["labels"])
    assert read.ids.tolist() == given["ids"]
    assert read.paths.tolist() == given["paths"]
    assert read.classes.tolist() == given["classes"]
    assert len(read) == ROWS
    assert manifest == written
    assert written.items() > MANIFEST.items()
    assert (written["count"], written["dimension"]) == (ROWS, DIMENSION)
    assert [shard["rows"] for shard in written["shards"]] == [10, 10, 5]


def test_integer_ids_and_missing_columns(tmp_path):
    numbered(tmp_path, paths=None, classes=None, labels=None)
    read = export.read_export(tmp_path)[0]
    assert read.ids.dtype == np.int64
    assert read.ids.tolist() == list(range(0, 3 * ROWS, 3))
    assert set(read.paths) == set(read.classes) == {""}
    assert read.labels.tolist() == [0] * ROWS
    write(tmp_path, labels=None)
    assert export.read_export(tmp_path)[0].labels.tolist() == [i % 3 for i in range(ROWS)]


def test_shards_are_plain_parquet_of_fixed_size_lists(tmp_path):
    manifest = write(tmp_path)
    path = tmp_path / manifest["shards"][0]["file"]
    schema = pq.read_schema(path)
    assert schema.field("embedding").type.equals(pa.list_(pa.float32(), DIMENSION))
    assert [str(schema.field(name).type) for name in ("id", "label", "class", "path")] == [
        "string",
        "int64",
        "string",
        "string",
    ]
    group = pq.ParquetFile(path).metadata.row_group(0)
    vectors = group.column(group.num_columns - 1)
    assert vectors.compression == "UNCOMPRESSED"
    assert "RLE_DICTIONARY" not in vectors.encodings


def test_the_same_export_has_the_same_identity(tmp_path):
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", vectors=columns(seed=1)["vectors"])
    assert first["sha256"] == again["sha256"] != other["sha256"]


def test_a_new_export_replaces_the_old_one_and_nothing_else(tmp_path):
    write(tmp_path)
    (tmp_path / "index").mkdir()
    (tmp_path / f"{STAGE_PREFIX}of-a-killed-run").mkdir()
    new = write(tmp_path, rows_per_shard=100, vectors=columns(seed=1)["vectors"])
    shards = [shard["file"] for shard in new["shards"]]
    assert names(tmp_path) == sorted([".lock", *shards, "index", "index.json"])
    np.testing.assert_array_equal(
        export.read_export(tmp_path)[0].vectors, columns(seed=1)["vectors"]
    )
    assert write(tmp_path, rows_per_shard=100, vectors=columns(seed=1)["vectors"]) == new
    export.read_export(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a"] * ROWS}, "ids must be unique, but 'a' appears twice"),
        ({"ids": ["a"]}, "ids has 1 entries for 25 embeddings"),
        ({"paths": ["a"]}, "paths has 1 entries for 25 embeddings"),
        ({"labels": np.zeros(3, int)}, "labels has 3 entries for 25 embeddings"),
        ({"manifest": {"checkpoint": "x"}}, "the manifest lacks configuration, preprocessing"),
        ({"manifest": MANIFEST | {"count": 1}}, "must not contain count"),
        ({"vectors": columns()["vectors"] * 2}, "embeddings: rows must be unit vectors"),
    ],
)
def test_invalid_input_is_an_error(tmp_path, change, message):
    write(tmp_path)
    before = names(tmp_path)
    with pytest.raises(UserError, match=message):
        write(tmp_path, **change)
    assert names(tmp_path) == before
    with pytest.raises(UserError, match=message):
        write(tmp_path / "fresh", **change)
    assert not (tmp_path / "fresh").exists()


def test_nan_is_an_error(tmp_path):
    vectors = columns()["vectors"]
    vectors[7, 2] = np.nan
    with pytest.raises(UserError, match="embeddings: rows must be finite, but row 7"):
        write(tmp_path, vectors=vectors)
    assert names(tmp_path) == []


def test_nothing_to_export(tmp_path):
    with pytest.raises(UserError, match="there are no embeddings"):
        write(tmp_path, **columns(rows=0))


def test_a_full_disk_keeps_the_old_export(tmp_path, monkeypatch):
    old = write(tmp_path)
    before = names(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "write_table", full)
    message = "cannot write .*: No space left on device; its content is unchanged"
    with pytest.raises(UserError, match=message):
        write(tmp_path, vectors=columns(seed=1)["vectors"])
    assert names(tmp_path) == before
    assert export.read_export(tmp_path)[1] == old


KILLED = """
import os, signal, sys
from pathlib import Path
import test_export as cases
from afa.retrieval import export

moment, directory = int(sys.argv[1]), sys.argv[2]
real, calls = Path.replace, []

def replace(self, target):  # called for every file of the export
    if len(calls) == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(target)
    return real(self, target)

Path.replace = replace
cases.write(directory, vectors=cases.columns(seed=1)["vectors"])
"""


def test_a_kill_at_any_time_leaves_a_complete_export(tmp_path):
    write(tmp_path)
    path = os.pathsep.join(map(str, (Path(__file__).parent, SUPPORT, ROOT)))
    environment = os.environ | {"PYTHONPATH": path}
    for moment in (0, 2, 3):  # before the first shard, between shards, before the manifest
        command = [sys.executable, "-c", KILLED, str(moment), str(tmp_path)]
        result = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        assert result.returncode == -signal.SIGKILL, result.stderr
        read = export.read_export(tmp_path)[0]
        np.testing.assert_array_equal(read.vectors, columns()["vectors"])
    new = write(tmp_path, vectors=columns(seed=1)["vectors"])
    assert names(tmp_path) == sorted(
        [".lock", *(shard["file"] for shard in new["shards"]), "index.json"]
    )


def damage(directory, **changes):
    path = directory / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_export_that_differs_from_its_manifest_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"contains no finished export: index.json is missing"):
        export.read_export(tmp_path)
    with pytest.raises(UserError, match=r"contains no finished export"):
        export.read_export(tmp_path / "absent")
    manifest = write(tmp_path)
    damage(tmp_path, dimension=7)
    with pytest.raises(UserError, match=r"holds 25 x 6 values, index\.json says 25 x 7"):
        export.read_export(tmp_path)
    damage(tmp_path, format=1)
    with pytest.raises(UserError, match="has format 1, this version reads format 2"):
        export.read_export(tmp_path)
    write(tmp_path)
    shard = tmp_path / manifest["shards"][1]["file"]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"is not the file index\.json names"):
        export.read_export(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"is missing, though index.json names it"):
        export.read_export(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: it is not JSON"):
        export.read_export(tmp_path)


def test_one_writer_at_a_time(tmp_path):
    write(tmp_path)
    error = pytest.raises(UserError, match="another process is writing there; wait for it")
    with staged(tmp_path), error:
        write(tmp_path)
    write(tmp_path)
