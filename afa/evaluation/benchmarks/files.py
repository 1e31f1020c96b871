"""Files of the benchmark `corrupted_queries`: its images for other software, and their vectors.

A directory holds `manifest.csv` (one line per image: id, class, role, corruption, severity, image),
`benchmark.json` (the `Definition`) and the images as PNG, each at the path that is its id. Vectors
are in one file: .npz with the arrays `ids` and `vectors`, or .parquet with the columns `id` and
`embedding`.
"""

import csv
import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from afa.console import track
from afa.data.images import decode
from afa.data.readable import reading_threads
from afa.errors import UserError, choose
from afa.evaluation.benchmarks.corrupted import (
    CATALOGUE,
    EVERY,
    GALLERY,
    QUERY,
    CorruptedQueries,
    Definition,
    Row,
)
from afa.evaluation.metrics.retrieval import check_finite
from afa.io import require_writable, write_bytes, write_json
from afa.retrieval.records import as_ids, as_vectors

MANIFEST, DEFINITION = "manifest.csv", "benchmark.json"
COLUMNS = ("id", "class", "role", "corruption", "severity", "image")
PROGRESS_FROM = 1000  # images
COMPRESSION = [cv2.IMWRITE_PNG_COMPRESSION, 1]  # noise hardly compresses: fast is as small


def write(directory: Path, benchmark: CorruptedQueries, threads: int = 0) -> None:
    """Writes all images, then the manifest and the definition.

    Args:
      directory: new or empty.
      benchmark: the benchmark.
      threads: number of threads; 0: one per core.

    Raises:
      UserError: the directory is not empty or cannot be written, or an image cannot be read.
    """
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"--write={directory}: is not empty")
    require_writable(directory, "--write")
    rows = benchmark.rows

    def save(index: int) -> None:
        path = directory / rows[index].id
        pixels = cv2.cvtColor(decode(benchmark.images[index]), cv2.COLOR_RGB2BGR)
        path.write_bytes(cv2.imencode(".png", pixels, COMPRESSION)[1].tobytes())

    try:
        for folder in {(directory / row.id).parent for row in rows}:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(reading_threads(threads)) as pool:
            saved = pool.map(save, range(len(rows)))
            list(track(saved, "writing images", len(rows), PROGRESS_FROM))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        write_bytes(directory / MANIFEST, text.getvalue().encode())
        write_json(directory / DEFINITION, benchmark.definition)
    except OSError as error:
        raise UserError(f"--write={directory}: cannot be written ({error.strerror})") from None


def read(directory: Path) -> tuple[Definition, tuple[Row, ...]]:
    """Reads definition and manifest of a directory that `write` has written.

    Raises:
      UserError: they are missing or malformed.
    """
    path = directory / DEFINITION
    try:
        content = json.loads(path.read_text("utf-8"))
        names = {field.name for field in dataclasses.fields(Definition)}
        if set(content) != names:
            raise ValueError(f"its fields are not {', '.join(sorted(names))}")
        groups = {name: tuple(each) for name, each in content["groups"].items()}
        severities = tuple(content["severities"])
        definition = Definition(**content | {"groups": groups, "severities": severities})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a definition of the benchmark ({error})") from None
    return definition, _rows(directory / MANIFEST)


def _rows(path: Path) -> tuple[Row, ...]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *lines = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: is not a manifest of the benchmark ({error})") from None
    if tuple(head) != COLUMNS:
        raise UserError(f"{path}: its first line must be {','.join(COLUMNS)}")
    return tuple(_row(f"{path}, line {i}", line) for i, line in enumerate(lines, 2))


def _row(place: str, line: Sequence[str]) -> Row:
    if len(line) != len(COLUMNS) or not line[4].isdecimal():
        raise UserError(f"{place}: is not {','.join(COLUMNS)}")
    row = Row(line[0], line[1], line[2], line[3], int(line[4]), line[5])
    choose(f"{place}: role", row.role, dict.fromkeys((QUERY, GALLERY, CATALOGUE)))
    if row.corruption:
        choose(f"{place}: corruption", row.corruption, EVERY)
    return row


# ---- vectors -----------------------------------------------------------------------------------


def read_vectors(path: Path, rows: Sequence[Row]) -> Float32[np.ndarray, "n d"]:
    """Reads the vectors of all rows from a file, scaled to unit length.

    The file may hold them in any order, and vectors of further ids.

    Raises:
      UserError: another format, ids that are missing or appear twice, or vectors that differ in
        dimension, are not finite, or are zero.
    """
    readers = {".npz": _from_npz, ".parquet": _from_parquet}
    if path.suffix not in readers:
        raise UserError(f"--vectors={path}: its suffix must be {' or '.join(readers)}")
    name = f"--vectors={path}"
    try:
        ids, values = readers[path.suffix](path)
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        pa.ArrowException,
    ) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: cannot be read ({reason})") from None
    vectors = as_vectors(f"{name}: vectors", values)
    ids = as_ids(f"{name}: ids", ids)
    if len(ids) != len(vectors):
        raise UserError(f"{name}: {len(ids)} ids for {len(vectors)} vectors")
    place = {each: i for i, each in enumerate(ids.tolist())}
    if missing := [row.id for row in rows if row.id not in place]:
        raise UserError(
            f"{name}: lacks {len(missing):,} of {len(rows):,} ids (first: {missing[0]!r}; an id of "
            f"the file: {next(iter(place), '')!r})"
        )
    chosen = vectors[[place[row.id] for row in rows]]
    check_finite(f"{name}: vectors", chosen)
    norms = np.sqrt(np.einsum("nd,nd->n", chosen, chosen, dtype=np.float64))
    if not norms.all():
        raise UserError(f"{name}: the vector of {rows[int(norms.argmin())].id!r} is zero")
    return (chosen / norms[:, None]).astype(np.float32)


def _from_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return file["ids"], file["vectors"]


def _from_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(path, columns=["id", "embedding"])
    column = table.column("embedding").combine_chunks()
    lengths = np.unique([len(each) for each in column])
    if len(lengths) != 1:
        raise ValueError(f"vectors of {len(lengths)} dimensions: {lengths[:3].tolist()}")
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return table.column("id").to_numpy(), flat.reshape(len(table), int(lengths[0]))
