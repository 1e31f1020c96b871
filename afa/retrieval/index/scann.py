"""`scann://`: approximate search on one machine.

ScaNN (Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector Quantization";
Sun et al. 2023, "SOAR: Improved Indexing for Approximate Nearest Neighbor Search") checks little:
with NaN it crashes or returns results, missing results are filled with row 0, a tree of more leaves
than rows fails, and a failed upsert leaves its ids changed. Therefore input is checked before
(`contract`), and an index is never modified (`local`).
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64

from afa.errors import UserError
from afa.io import file_sha256, joint_sha256
from afa.retrieval.exact import PADDING
from afa.retrieval.index import flat
from afa.retrieval.index.local import Allowed, Builder, Engine, InProcess, RangeResults, TopK
from afa.retrieval.index.uri import Address

HASHING_FROM = 20_000  # rows; with fewer, brute force is as fast
TREE_FROM = 100_000  # rows; with fewer, hashing alone is as fast
SEARCHED_LEAVES = 0.1  # share of the leaves a query visits: recall@10 of 0.999 on clustered vectors
TRAINING_ROWS = 250_000
CODES = 16  # codes per block of dimensions; hashing needs at least this many rows
PARALLEL_FROM = 64  # queries per call from which all cores are used
FILTER_BY_ROWS = 0.05  # share of allowed rows below which they are searched exactly
MARGIN = 1.5  # factor on the expected number of candidates that a filter needs
Kind = Literal["brute_force", "hashing", "tree"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings of ScaNN.

    Attributes:
      kind: brute_force compares with every row, hashing with a short code of every row, tree
        with the codes in the leaves near the query.
      leaves: number of leaves of the tree, at most the number of rows.
      searched: leaves searched per query.
      reduced: dimensions of the PCA that leaves and codes are computed from; 0 for all. For trees
        only. Re-scoring uses all dimensions.
      reorder: candidates re-scored exactly for 10 results; proportionally more for more results.
      block: dimensions per code of 4 bits.
      threshold: of anisotropic quantization, for unit vectors.
      spherical: spherical k-means for the leaves; plain k-means loses a fifth of the results on
        unit vectors.
      soar: weight of orthogonality in the assignment of rows to a second leaf; 0 for one leaf.
      tuned: whether it was chosen by measurement; it is then kept when the index is rebuilt.
    """

    kind: Kind = "brute_force"
    leaves: int = 0
    searched: int = 0
    reduced: int = 0
    reorder: int = 100
    block: int = 2
    threshold: float = 0.2
    spherical: bool = True
    soar: float = 0.0
    tuned: bool = False

    def candidates(self, k: int) -> int:
        """Returns the number of rows to re-score exactly for k results."""
        if k <= 10:
            return max(k, self.reorder)
        return max(k, round(self.reorder * k / 10))


OPTIONS: dict[str, type] = {
    "leaves": int, "searched": int, "reduced": int, "reorder": int, "block": int,
    "threshold": float, "spherical": bool, "soar": float, "threads": int,
}  # fmt: skip


def rule(count: int) -> Plan:
    """Returns the settings for `count` vectors, as ScaNN's authors recommend."""
    if count < HASHING_FROM:
        return Plan()
    if count < TREE_FROM:
        return Plan("hashing")
    leaves = round(count**0.5)
    return Plan("tree", leaves, max(1, round(leaves * SEARCHED_LEAVES)))


class ScannEngine(Engine):
    """A ScaNN searcher over fixed rows; some filtered and range searches use the rows directly.

    Attributes:
      plan: its settings.
      searcher: the searcher of the ScaNN library.
    """

    def __init__(
        self, vectors: Float32[np.ndarray, "n d"], plan: Plan, searcher: Any, threads: int = 0
    ) -> None:
        self.plan, self.searcher, self._vectors = plan, searcher, vectors
        self._threads = threads
        if threads > 1:
            searcher.set_num_threads(threads - 1)  # the calling thread works too

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._vectors)

    @classmethod
    def build(
        cls, vectors: Float32[np.ndarray, "n d"], plan: Plan, threads: int = 0
    ) -> "ScannEngine":
        """Trains and builds an engine.

        Args:
          vectors: unit vectors.
          plan: its settings.
          threads: number of threads for many queries; 0 for all cores.
        """
        with _quiet():
            return cls(vectors, plan, _build(vectors, plan), threads)

    def with_plan(self, **changes: Any) -> "ScannEngine":
        """Returns an engine with another `searched` or `reorder`; the searcher is not rebuilt."""
        plan = dataclasses.replace(self.plan, **changes)
        return ScannEngine(self._vectors, plan, self.searcher, self._threads)

    def search(self, queries: Float32[np.ndarray, "q d"], k: int, allowed: Allowed) -> TopK:
        if allowed is None:
            found = self._search_all(queries, k)
            # A leaf can be empty. A query whose searched leaves all are would have no result.
            return self._exact_for(found[1][:, 0] == -np.inf, queries, found, None)
        count = int(allowed.sum())
        share = count / len(allowed)
        if count <= k or share < FILTER_BY_ROWS:
            return flat.topk(queries, self._vectors, k, allowed)
        candidates = min(len(allowed), round(k / share * MARGIN) + k)
        rows, scores = self._search_all(queries, candidates)
        rows, scores = _masked(rows, scores, allowed[rows], k)
        short = scores[:, -1] == -np.inf  # too few candidates of these queries are allowed
        return self._exact_for(short, queries, (rows, scores), allowed)

    def _exact_for(
        self,
        chosen: Bool[np.ndarray, "q"],
        queries: Float32[np.ndarray, "q d"],
        found: TopK,
        allowed: Allowed,
    ) -> TopK:
        """Replaces the results of the chosen queries by exact ones."""
        rows, scores = found
        if chosen.any():
            exact = flat.topk(queries[chosen], self._vectors, rows.shape[1], allowed)
            rows[chosen], scores[chosen] = exact
        return rows, scores

    def within(
        self, queries: Float32[np.ndarray, "q d"], score: float, allowed: Allowed
    ) -> list[RangeResults]:
        return [self._within(query, score, allowed) for query in queries]

    def _within(
        self,
        query: Float32[np.ndarray, "d"],
        score: float,
        allowed: Allowed,
    ) -> RangeResults:
        """Doubles the number of results until the last one is not similar enough."""
        count = len(self._vectors)
        k = 64
        while k < FILTER_BY_ROWS * count:
            rows, scores = self._search_all(query[None], k)
            if scores[0, -1] == -np.inf:
                break  # too few leaves for so many results: some may be missing
            if scores[0, -1] < score:
                near = scores[0] >= score
                if allowed is not None:
                    near &= allowed[rows[0]]
                return rows[0, near], scores[0, near]
            k *= 2
        return flat.within(query, self._vectors, score, allowed)

    def _search_all(self, queries: Float32[np.ndarray, "q d"], k: int) -> TopK:
        """Searches all rows."""
        plan = self.plan
        candidates = -1 if plan.kind == "brute_force" else plan.candidates(k)
        searched = plan.searched or -1
        if len(queries) == 1:
            rows, scores = self.searcher.search(queries[0], k, candidates, searched)
            if len(rows) == k:  # of one query, missing results are left out
                return rows.astype(np.int64)[None], scores[None]
            short = k - len(rows)
            rows = np.pad(rows.astype(np.int64), (0, short))
            return _filled(rows[None], np.pad(scores, (0, short), constant_values=np.nan)[None])
        search = self.searcher.search_batched
        if len(queries) >= PARALLEL_FROM and self._threads != 1:
            search = self.searcher.search_batched_parallel
        rows, scores = search(np.ascontiguousarray(queries), k, candidates, searched)
        return _filled(rows, scores)

    def info(self) -> dict[str, Any]:
        return dataclasses.asdict(self.plan)

    def write(self, stage: Path) -> dict[str, Any]:
        folder, sums = _serialize(self.searcher, stage)
        return {"plan": dataclasses.asdict(self.plan), "folder": folder, "files": sums}


def read(
    directory: Path, vectors: Float32[np.ndarray, "n d"], stored: dict[str, Any], address: Address
) -> ScannEngine:
    """Opens what `ScannEngine.write` wrote.

    Raises:
      UserError: ScaNN is not installed, or a file is missing, unexpected or damaged.
    """
    folder = directory / stored["folder"]
    _verify(folder, stored["files"])
    with _quiet():
        searcher = _scann().load_searcher(str(folder))
    threads = options(address).get("threads", 0)
    return ScannEngine(vectors, Plan(**stored["plan"]), searcher, threads)


def options(address: Address) -> dict[str, Any]:
    """Returns the options of an address: attributes of `Plan`, and `threads` for many queries.

    Raises:
      UserError: ScaNN is not installed, a location, an unknown option, or an invalid value.
    """
    if address.location:
        raise UserError(f"{address.text!r}: scann:// takes no location, only options after ?")
    values = address.read(OPTIONS)
    for name, value in values.items():
        least = 0 if name in ("soar", "threshold", "reduced") else 1
        if name != "spherical" and not value >= least:  # NaN is too small as well
            raise UserError(f"{address.text!r}: {name}={value} is too small")
    if values.get("searched", 0) > values.get("leaves", float("inf")):
        raise UserError(f"{address.text!r}: searched must not exceed leaves")
    _scann()
    return values


def planned(count: int, values: dict[str, Any], tuned: Plan | None = None) -> Plan:
    """Returns the settings for `count` rows: those of `tuned` or of `rule`, with the options of an
    address; a tree if these have leaves; brute force if there are too few rows to hash."""
    if count < CODES:
        return Plan()
    plan = rule(count) if tuned is None else tuned
    if "leaves" in values:
        leaves = min(values["leaves"], count)
        searched = max(1, round(leaves * SEARCHED_LEAVES))
        plan = dataclasses.replace(plan, kind="tree", searched=searched)
    plan = dataclasses.replace(plan, **values)
    leaves = min(plan.leaves, count)
    return dataclasses.replace(plan, leaves=leaves, searched=min(plan.searched, leaves))


def installed() -> bool:
    """Returns whether ScaNN is installed."""
    return importlib.util.find_spec("scann") is not None


# ---- the library -------------------------------------------------------------------------------


def _scann() -> Any:
    try:
        return importlib.import_module("scann").scann_ops_pybind
    except ImportError as error:
        fix = "install scann (Linux, Python below 3.14)"
        if installed():
            fix = "TensorFlow 2.21 and later break it, 2.20 does not"
        raise UserError(f"scann:// cannot be used ({error}): {fix}, or use exact://") from None


def _build(vectors: Float32[np.ndarray, "n d"], plan: Plan) -> Any:
    builder = _scann().builder(vectors, 10, "dot_product")
    if plan.kind == "brute_force":
        return builder.score_brute_force().build()
    sample = min(len(vectors), TRAINING_ROWS)
    if plan.kind == "tree":
        if 0 < plan.reduced < vectors.shape[1]:
            builder = builder.pca(plan.reduced, pca_significance_threshold=None)
        builder = builder.tree(
            plan.leaves,
            plan.searched,
            training_sample_size=sample,
            spherical=plan.spherical,
            soar_lambda=plan.soar or None,
        )
    hashed = builder.score_ah(
        plan.block,
        anisotropic_quantization_threshold=plan.threshold or float("nan"),
        training_sample_size=sample,
    )
    return hashed.reorder(plan.reorder).build()


def _filled(
    rows: np.ndarray, scores: Float32[np.ndarray, "q k"]
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """Marks missing results, for which ScaNN returns row 0 and NaN."""
    missing = np.isnan(scores)
    rows = rows.astype(np.int64)
    if missing.any():
        rows[missing] = PADDING
        scores = np.where(missing, np.float32(-np.inf), scores)
    return rows, scores


def _masked(
    rows: Int64[np.ndarray, "q w"],
    scores: Float32[np.ndarray, "q w"],
    kept: Bool[np.ndarray, "q w"],
    k: int,
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """Returns the first k results of each query that are kept and not missing."""
    kept = kept & (rows != PADDING)
    order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
    rows = np.where(np.take_along_axis(kept, order, 1), np.take_along_axis(rows, order, 1), PADDING)
    similar = np.take_along_axis(scores, order, 1)
    return rows, np.where(rows == PADDING, np.float32(-np.inf), similar)


def _serialize(searcher: Any, stage: Path) -> tuple[str, dict[str, str]]:
    """Writes the searcher to a folder named by its content; returns its name and file hashes."""
    draft = stage / "draft"
    draft.mkdir()
    try:
        searcher.serialize(str(draft), relative_path=True)
    except RuntimeError as error:  # ScaNN's error for a full disk
        raise OSError(str(error)) from error
    sums = {path.name: file_sha256(path) for path in sorted(draft.iterdir())}
    digest = joint_sha256(sums.values())
    folder = draft.rename(stage / f"scann-{digest[:12]}")
    return folder.name, sums


def _verify(folder: Path, sums: dict[str, str]) -> None:
    """Checks the hash of every file, because ScaNN does not check them and may unpickle one."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for name in sorted(present | set(sums)):
        if name not in sums:
            raise UserError(f"{folder / name} does not belong to the index; build it again")
        if name not in present:
            raise UserError(f"{folder / name} is missing; build the index again")
        if file_sha256(folder / name) != sums[name]:
            raise UserError(f"{folder / name} is damaged (sha256 differs); build the index again")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what ScaNN's C++ code writes to standard error, unless it fails."""
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


def _builder(address: Address, info: dict[str, Any] | None) -> Builder:
    values = options(address)
    threads = values.pop("threads", 0)
    tuned = Plan(**info) if info is not None and info["tuned"] else None

    def build(vectors: Float32[np.ndarray, "n d"]) -> ScannEngine:
        return ScannEngine.build(vectors, planned(len(vectors), values, tuned), threads)

    return build


ENGINE = InProcess(options, _builder, read)
