"""`scann://`: approximate search on one machine.

ScaNN (Guo et al. 2020, "Accelerating Large-Scale Inference with Anisotropic Vector Quantization";
Sun et al. 2023, "SOAR: Improved Indexing for Approximate Nearest Neighbor Search") is fast and
unforgiving: NaN kills the process or is answered, missing results are filled up with row 0, a tree
of more leaves than rows fails, a failed upsert leaves its ids changed. What it must not see is
refused before it can (`contract`), and it is never asked to change (`local`).
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
from afa.retrieval.index.local import Allowed, Engine, Found, Near
from afa.retrieval.index.uri import Address

HASHING_FROM = 20_000  # rows; below, comparing with every row is as fast
TREE_FROM = 100_000  # rows; below, hashing alone is as fast
SEARCHED_LEAVES = 0.1  # share of the leaves a query visits: recall@10 of 0.999 on clustered vectors
TRAINING_ROWS = 250_000
CODES = 16  # that stand for a block of dimensions; no fewer rows can be hashed
PARALLEL_FROM = 64  # queries in a call from which all cores work on them
FILTER_BY_ROWS = 0.05  # share of the rows; below, what a filter leaves is compared row by row
MARGIN = 1.5  # more candidates than a filter should need
Kind = Literal["brute_force", "hashing", "tree"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How ScaNN searches.

    Attributes:
      kind: brute_force compares with every row, hashing with a short code of every row, a tree
        with the codes in the leaves near a query.
      leaves: of the tree, at most one a row.
      searched: leaves that a query visits.
      reduced: dimensions of a PCA in which leaves and codes see the vectors; 0 is all of them. Of a
        tree alone. What is compared exactly is whole.
      reorder: candidates that are compared exactly, for 10 results; more results take more.
      block: dimensions that a code of 4 bits stands for.
      threshold: of anisotropic quantization, for unit vectors.
      spherical: leaves of directions: cells of plain k-means lose a fifth of the results on unit
        vectors.
      soar: weight of orthogonality with which rows are put into a second leaf; 0 puts them in one.
      tuned: whether measurement chose it: then it stays when the index is built again.
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
        """Rows that are compared exactly for k results."""
        if k <= 10:
            return max(k, self.reorder)
        return max(k, round(self.reorder * k / 10))


OPTIONS: dict[str, type] = {
    "leaves": int, "searched": int, "reduced": int, "reorder": int, "block": int,
    "threshold": float, "spherical": bool, "soar": float, "threads": int,
}  # fmt: skip


def rule(count: int) -> Plan:
    """How to search `count` vectors, after the rules of its makers."""
    if count < HASHING_FROM:
        return Plan()
    if count < TREE_FROM:
        return Plan("hashing")
    leaves = round(count**0.5)
    return Plan("tree", leaves, max(1, round(leaves * SEARCHED_LEAVES)))


class ScannEngine(Engine):
    """A ScaNN searcher over some rows, and the rows themselves for what it cannot answer.

    Attributes:
      plan: how it searches.
      searcher: ScaNN's own.
    """

    def __init__(
        self, vectors: Float32[np.ndarray, "n d"], plan: Plan, searcher: Any, threads: int = 0
    ) -> None:
        self.plan, self.searcher, self._vectors = plan, searcher, vectors
        self._threads = threads
        if threads > 1:
            searcher.set_num_threads(threads - 1)  # who asks works too

    @property
    def rows(self) -> int:
        """Over how many rows it stands."""
        return len(self._vectors)

    @classmethod
    def build(
        cls, vectors: Float32[np.ndarray, "n d"], plan: Plan, threads: int = 0
    ) -> "ScannEngine":
        """Trains and fills it.

        Args:
          vectors: unit vectors.
          plan: how it searches.
          threads: that work on many queries; 0 is all cores.
        """
        with _quiet():
            return cls(vectors, plan, _build(vectors, plan), threads)

    def with_plan(self, **changes: Any) -> "ScannEngine":
        """The same searcher asked otherwise: another `searched` or `reorder` needs no building."""
        plan = dataclasses.replace(self.plan, **changes)
        return ScannEngine(self._vectors, plan, self.searcher, self._threads)

    def search(self, queries: Float32[np.ndarray, "q d"], k: int, allowed: Allowed) -> Found:
        if allowed is None:
            return self._ask(queries, k)
        count = int(allowed.sum())
        share = count / len(allowed)
        if count <= k or share < FILTER_BY_ROWS:
            return flat.topk(queries, self._vectors, k, allowed)
        wanted = min(len(allowed), round(k / share * MARGIN) + k)
        rows, scores = self._ask(queries, wanted)
        rows, scores = _masked(rows, scores, allowed[rows], k)
        short = scores[:, -1] == -np.inf
        if short.any():  # the candidates of these queries are not of what the filter leaves
            rows[short], scores[short] = flat.topk(queries[short], self._vectors, k, allowed)
        return rows, scores

    def within(
        self, queries: Float32[np.ndarray, "q d"], score: float, allowed: Allowed
    ) -> list[Near]:
        return [self._within(query, score, allowed) for query in queries]

    def _within(
        self,
        query: Float32[np.ndarray, "d"],
        score: float,
        allowed: Allowed,
    ) -> Near:
        """Twice as many results again and again, until the last one is not similar enough."""
        count = len(self._vectors)
        k = 64
        while k < FILTER_BY_ROWS * count:
            rows, scores = self._ask(query[None], k)
            if scores[0, -1] == -np.inf:
                break  # too few leaves for so many results: those at hand may not be all
            if scores[0, -1] < score:
                near = scores[0] >= score
                if allowed is not None:
                    near &= allowed[rows[0]]
                return rows[0, near], scores[0, near]
            k *= 2
        return flat.within(query, self._vectors, score, allowed)

    def _ask(self, queries: Float32[np.ndarray, "q d"], k: int) -> Found:
        plan = self.plan
        candidates = -1 if plan.kind == "brute_force" else plan.candidates(k)
        searched = plan.searched or -1
        if len(queries) == 1:
            found, scores = self.searcher.search(queries[0], k, candidates, searched)
            if len(found) == k:  # alone, a query's list is short where results are missing
                return found.astype(np.int64)[None], scores[None]
            short = k - len(found)
            found = np.pad(found.astype(np.int64), (0, short))
            return _filled(found[None], np.pad(scores, (0, short), constant_values=np.nan)[None])
        search = self.searcher.search_batched
        if len(queries) >= PARALLEL_FROM and self._threads != 1:
            search = self.searcher.search_batched_parallel
        found, scores = search(np.ascontiguousarray(queries), k, candidates, searched)
        return _filled(found, scores)

    def info(self) -> dict[str, Any]:
        return dataclasses.asdict(self.plan)

    def write(self, stage: Path) -> dict[str, Any]:
        folder, sums = _serialize(self.searcher, stage)
        return {"plan": dataclasses.asdict(self.plan), "folder": folder, "files": sums}


def read(
    directory: Path,
    vectors: Float32[np.ndarray, "n d"],
    stored: dict[str, Any],
    threads: int = 0,
) -> ScannEngine:
    """Opens what `ScannEngine.write` wrote.

    Raises:
      UserError: ScaNN is not installed, or a file is missing, foreign or damaged.
    """
    folder = directory / stored["folder"]
    _verify(folder, stored["files"])
    with _quiet():
        searcher = _scann().load_searcher(str(folder))
    return ScannEngine(vectors, Plan(**stored["plan"]), searcher, threads)


def options(address: Address) -> dict[str, Any]:
    """What an address says: attributes of `Plan`, and `threads` that work on many queries.

    Raises:
      UserError: ScaNN is not installed, an unknown option, a place, or a value that cannot be.
    """
    if address.place:
        raise UserError(f"{address.text!r}: scann:// takes no place, only options behind ?")
    values = address.read(OPTIONS)
    for name, value in values.items():
        least = 0 if name in ("soar", "threshold", "reduced") else 1
        if name != "spherical" and not value >= least:  # NaN is too small as well
            raise UserError(f"{address.text!r}: {name}={value} is too small")
    if values.get("searched", 0) > values.get("leaves", float("inf")):
        raise UserError(f"{address.text!r}: a query cannot visit more leaves than there are")
    _scann()
    return values


def planned(count: int, values: dict[str, Any], tuned: Plan | None = None) -> Plan:
    """The rule for so many rows, or what was tuned, changed by what an address says; a tree where
    that has leaves; comparing with every row where there are too few to hash."""
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
    """Whether there is a ScaNN here."""
    return importlib.util.find_spec("scann") is not None


# ---- the library -------------------------------------------------------------------------------


def _scann() -> Any:
    try:
        return importlib.import_module("scann").scann_ops_pybind
    except ImportError as error:
        cure = "install scann (Linux, Python below 3.14)"
        if installed():
            cure = "TensorFlow 2.21 and later break it, 2.20 does not"
        raise UserError(f"scann:// cannot be used ({error}): {cure}, or use exact://") from None


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
    """ScaNN fills up with row 0 and a distance of NaN."""
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
    """The first k of each line that are kept and there."""
    kept = kept & (rows != PADDING)
    order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
    rows = np.where(np.take_along_axis(kept, order, 1), np.take_along_axis(rows, order, 1), PADDING)
    similar = np.take_along_axis(scores, order, 1)
    return rows, np.where(rows == PADDING, np.float32(-np.inf), similar)


def _serialize(searcher: Any, stage: Path) -> tuple[str, dict[str, str]]:
    """Writes the searcher into a folder named after its content; returns it and its files' sums."""
    draft = stage / "draft"
    draft.mkdir()
    try:
        searcher.serialize(str(draft), relative_path=True)
    except RuntimeError as error:  # what ScaNN makes of a full disk
        raise OSError(str(error)) from error
    sums = {path.name: file_sha256(path) for path in sorted(draft.iterdir())}
    digest = joint_sha256(sums.values())
    folder = draft.rename(stage / f"scann-{digest[:12]}")
    return folder.name, sums


def _verify(folder: Path, sums: dict[str, str]) -> None:
    """ScaNN trusts what it opens, and unpickles a file if there is one: only what was built is."""
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
