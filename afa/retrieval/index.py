"""Fast search over exported embeddings: a ScaNN index, and the same contract without ScaNN.

An index belongs to one export: it carries the export's identity, checkpoint and preprocessing, and
refuses to open over another. All paths in it are relative, so export and index move together.

ScaNN (Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector Quantization")
is fast and unforgiving: NaN kills the process or is answered, missing results are filled up with
row 0, a tree of more leaves than rows fails. What it must not see is refused before it can.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Int64

from afa.errors import UserError, choose
from afa.retrieval import exact, export

Engine = Literal["scann", "exact"]
PADDING = exact.PADDING

HASHING_FROM = 20_000  # rows; below, comparing with every row is as fast
TREE_FROM = 100_000  # rows; below, hashing alone is as fast
SEARCHED_LEAVES = 0.1  # share of the leaves a query visits: recall@10 of 0.999 on clustered vectors
REORDER = 10  # candidates compared exactly for each result asked for
MIN_REORDER = 100
BLOCK_DIMENSIONS = 2  # dimensions a code stands for
ANISOTROPIC_THRESHOLD = 0.2  # for unit vectors, of the paper
TRAINING_ROWS = 250_000
DEFAULT_K = 10
SINGLE_QUERIES = 200  # enough to time them one by one
SCORE_TOLERANCE = 1e-5

BOUND = ("sha256", "checkpoint", "preprocessing", "count", "dimension")


# What an engine is: queries, k -> rows (-1: none) and similarities (-inf: none), best first.
Searcher = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Index:
    """An index that is open: `Index.load(directory)`.

    Attributes:
      embeddings: the export it searches, with ids, classes and paths.
      manifest: contents of the index's own `index.json`.
      engine: what answers.
    """

    def __init__(
        self,
        embeddings: export.Embeddings,
        manifest: dict[str, Any],
        engine: Engine,
        searcher: Searcher,
    ) -> None:
        self.embeddings, self.manifest, self.engine = embeddings, manifest, engine
        self._searcher = searcher

    @classmethod
    def load(cls, directory: Path | str, engine: Engine | None = None) -> "Index":
        """Opens an index and the export it belongs to.

        Args:
          directory: where `build` put it.
          engine: "exact" searches a ScaNN index's export without ScaNN; None is what was built.

        Raises:
          UserError: no index, an export that is not the one it was built over (naming the fields
            that differ), a damaged file, ScaNN not installed, or an engine that was not built.
        """
        directory = Path(directory)
        manifest = export.read_manifest(directory, "index")
        embeddings = export.read_embeddings(directory / manifest["embeddings"])
        _same(f"the index in {directory}", manifest["bound"], _bound(embeddings.manifest))
        wanted = manifest["engine"] if engine is None else engine
        _check_name(wanted)
        if wanted == "exact":
            return cls(embeddings, manifest, "exact", _Exact(embeddings.vectors))
        if manifest["engine"] != "scann":
            raise UserError(f"{directory} was built with engine='exact'; build it with 'scann'")
        _verify(directory / manifest["folder"], manifest["files"])
        with _quiet():
            searcher = _scann().load_searcher(str(directory / manifest["folder"]))
        return cls(embeddings, manifest, "scann", _Scann(searcher, manifest["plan"]))

    def require(self, **expected: Any) -> None:
        """Refuses an index over vectors that the queries at hand cannot be compared with.

        Args:
          expected: fields of the export's manifest and the values the query's model has, such as
            `checkpoint` and `preprocessing`.

        Raises:
          UserError: naming the fields that differ, with both values.
        """
        found = {name: self.embeddings.manifest.get(name) for name in expected}
        _same("the index", found, expected)

    def search(
        self, queries: Float32[np.ndarray, "q d"], k: int = DEFAULT_K
    ) -> tuple[list[tuple[str, ...]], list[Float32[np.ndarray, "_"]]]:
        """The ids and similarities of the k most similar pictures of each query, best first.

        An approximate engine may find fewer than k for a query; its list is then shorter.

        Raises:
          UserError: as `rows`.
        """
        rows, scores = self.rows(queries, k)
        found = rows != PADDING
        ids = self.embeddings.ids
        names = [
            tuple(ids[row] for row in line[own]) for line, own in zip(rows, found, strict=True)
        ]
        return names, [line[own] for line, own in zip(scores, found, strict=True)]

    def rows(
        self, queries: Float32[np.ndarray, "q d"], k: int = DEFAULT_K
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        """As `search`, but rows of the export; -1 and -inf where fewer than k were found.

        Raises:
          UserError: queries of another dimension, not finite or not of unit length, or a k that is
            below 1 or above the number of pictures.
        """
        count, dimension = self.embeddings.vectors.shape
        if queries.shape[1] != dimension:
            raise UserError(
                f"queries have {queries.shape[1]} dimensions, the index has {dimension}"
            )
        exact.check_unit("queries", queries)
        if not 1 <= k <= count:
            raise UserError(f"k={k} is not between 1 and {count}, the pictures in the index")
        if not len(queries):
            return np.zeros((0, k), np.int64), np.zeros((0, k), np.float32)
        return self._searcher(queries, k)


def default_engine() -> Engine:
    """ScaNN where it is installed, exact search elsewhere."""
    return "scann" if importlib.util.find_spec("scann") else "exact"


def build(
    embeddings_dir: Path | str,
    out_dir: Path | str | None = None,
    engine: Engine | None = None,
) -> Index:
    """Builds an index over an export, replacing the one that is there, and opens it.

    Args:
      embeddings_dir: an export (`afa.retrieval.export.write_embeddings`).
      out_dir: None is `index` inside the export.
      engine: None is `default_engine()`.

    Raises:
      UserError: no export, a damaged one, ScaNN asked for but not installed, or a full disk.
    """
    source = Path(embeddings_dir)
    target = source / "index" if out_dir is None else Path(out_dir)
    engine = default_engine() if engine is None else engine
    check_engine(engine)
    embeddings = export.read_embeddings(source)
    manifest: dict[str, Any] = {
        "format": export.FORMAT,
        "engine": engine,
        "embeddings": Path(os.path.relpath(source.resolve(), target.resolve())).as_posix(),
        "bound": _bound(embeddings.manifest),
    }
    searcher = None
    with export.staged(target) as stage:
        started = time.perf_counter()
        if engine == "scann":
            manifest["plan"] = plan(len(embeddings))
            with _quiet():
                searcher = _build_scann(embeddings.vectors, manifest["plan"])
                manifest["folder"], manifest["files"] = _serialize(searcher, stage)
        manifest["build_seconds"] = time.perf_counter() - started
        export.publish(stage, target, manifest, "scann-*")
    if searcher is None:
        return Index(embeddings, manifest, "exact", _Exact(embeddings.vectors))
    return Index(embeddings, manifest, "scann", _Scann(searcher, manifest["plan"]))


def plan(count: int) -> dict[str, Any]:
    """How ScaNN should search `count` vectors, after the rules of its makers.

    Returns:
      `kind`, one of brute_force, hashing and tree, and for a tree its `leaves` and how many of them
      a query visits (`searched`).
    """
    if count < HASHING_FROM:
        return {"kind": "brute_force"}
    if count < TREE_FROM:
        return {"kind": "hashing"}
    leaves = round(count**0.5)
    return {"kind": "tree", "leaves": leaves, "searched": max(1, round(leaves * SEARCHED_LEAVES))}


def measure(
    index: Index, queries: Float32[np.ndarray, "q d"], k: int = DEFAULT_K
) -> dict[str, float]:
    """What an index loses against exact search, and how fast it answers.

    Args:
      index: the index.
      queries: unit vectors.
      k: results a query.

    Returns:
      `recall_at_{k}`: share of the results that are among the k best; an equal similarity counts,
      so copies of a picture stand for each other.
      `queries_per_second`: all queries in one call.
      `single_queries_per_second`: one query a call.
      `build_seconds`.

    Raises:
      UserError: no queries, or as `Index.rows`.
    """
    if not len(queries):
        raise UserError("there are no queries to measure with")
    index.rows(queries, k)  # compiles and fills caches
    rows, batched = _timed(lambda: index.rows(queries, k)[0])
    single = queries[:SINGLE_QUERIES]
    index.rows(single[:1], k)
    _, one_by_one = _timed(lambda: [index.rows(query[None], k) for query in single])
    vectors = index.embeddings.vectors
    worst = exact.topk(queries, vectors, k)[0][:, -1:]
    score = np.einsum("qkd,qd->qk", vectors[rows], queries)
    hit = (rows != PADDING) & (score >= worst - SCORE_TOLERANCE)
    return {
        f"recall_at_{k}": float(hit.mean()),
        "queries_per_second": len(queries) / batched,
        "single_queries_per_second": len(single) / one_by_one,
        "build_seconds": index.manifest["build_seconds"],
    }


# ---- engines -----------------------------------------------------------------------------------


class _Exact:
    def __init__(self, vectors: Float32[np.ndarray, "n d"]) -> None:
        self._gallery = exact.Gallery(vectors)

    def __call__(
        self, queries: Float32[np.ndarray, "q d"], k: int
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        scores, rows = exact.topk(queries, self._gallery, k)
        return rows, scores


class _Scann:
    def __init__(self, searcher: Any, plan: dict[str, Any]) -> None:
        self._searcher, self._plan = searcher, plan

    def __call__(
        self, queries: Float32[np.ndarray, "q d"], k: int
    ) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
        brute_force = self._plan["kind"] == "brute_force"
        candidates = None if brute_force else max(MIN_REORDER, REORDER * k)
        leaves = self._plan.get("searched")
        found, scores = self._searcher.search_batched(
            np.ascontiguousarray(queries), k, candidates, leaves
        )
        # ScaNN fills up with row 0 and a distance of NaN
        missing = np.isnan(scores)
        rows = np.where(missing, PADDING, found.astype(np.int64))
        return rows, np.where(missing, np.float32(-np.inf), scores)


def check_engine(engine: str) -> None:
    """Whether an engine can be used here.

    Raises:
      UserError: there is no such engine, or ScaNN is not installed.
    """
    _check_name(engine)
    if engine == "scann":
        _scann()


def _check_name(engine: str) -> None:
    choose("retrieval.engine", engine, dict.fromkeys(get_args(Engine)))


def _scann() -> Any:
    try:
        return importlib.import_module("scann").scann_ops_pybind
    except ImportError as error:
        raise UserError(
            f"engine='scann' cannot be used ({error}): install scann (Linux, Python below 3.14),"
            " or use engine='exact'"
        ) from None


def _build_scann(vectors: Float32[np.ndarray, "n d"], plan: dict[str, Any]) -> Any:
    builder = _scann().builder(vectors, DEFAULT_K, "dot_product")
    if plan["kind"] == "brute_force":
        return builder.score_brute_force().build()
    sample = min(len(vectors), TRAINING_ROWS)
    if plan["kind"] == "tree":
        # leaves of directions: cells of plain k-means lose a fifth of the results on unit vectors
        builder = builder.tree(
            plan["leaves"], plan["searched"], training_sample_size=sample, spherical=True
        )
    hashed = builder.score_ah(
        BLOCK_DIMENSIONS,
        anisotropic_quantization_threshold=ANISOTROPIC_THRESHOLD,
        training_sample_size=sample,
    )
    return hashed.reorder(MIN_REORDER).build()


def _serialize(searcher: Any, stage: Path) -> tuple[str, dict[str, str]]:
    """Writes the searcher into a folder named after its content; returns it and its files' sums."""
    draft = stage / "draft"
    draft.mkdir()
    try:
        searcher.serialize(str(draft), relative_path=True)
    except RuntimeError as error:  # what ScaNN makes of a full disk
        raise OSError(str(error)) from error
    files = {path.name: export.file_sha256(path) for path in sorted(draft.iterdir())}
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()
    folder = draft.rename(stage / f"scann-{digest[:12]}")
    return folder.name, files


def _verify(folder: Path, files: dict[str, str]) -> None:
    """ScaNN trusts what it opens, and unpickles a file if there is one: only what was built is."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for name in sorted(present | set(files)):
        if name not in files:
            raise UserError(f"{folder / name} does not belong to the index; build it again")
        if name not in present:
            raise UserError(f"{folder / name} is missing; build the index again")
        if export.file_sha256(folder / name) != files[name]:
            raise UserError(f"{folder / name} is damaged (sha256 differs); build the index again")


# ---- helpers -----------------------------------------------------------------------------------


def _bound(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: manifest[name] for name in BOUND}


def _same(what: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    different = [name for name in expected if found.get(name) != expected[name]]
    if different:
        told = ", ".join(
            f"{name} {found.get(name)!r}, not {expected[name]!r}" for name in different
        )
        raise UserError(f"{what} does not fit: {told}; export and build it again")


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what ScaNN's C++ logs to standard error; shows it when ScaNN fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            log.seek(0)
            os.write(2, log.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
