"""Measures recall and speed of an index, and tunes its settings for a recall at the highest speed.

Ground truth is exact search. Queries are rows of the gallery, each searched among the other rows.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from afa.errors import UserError
from afa.retrieval import exact
from afa.retrieval.index import scann
from afa.retrieval.index.contract import DEFAULT_K, NO_RESULT, Index
from afa.retrieval.index.scann import Plan, ScannEngine
from afa.retrieval.records import Records

QUERIES = 1000  # recall is resolved to 0.1 %
SINGLE_QUERIES = 200  # queries that are timed one by one
SCORE_TOLERANCE = 1e-5  # ties count as found: copies of an image are interchangeable
MEASURED_SEED = 1
TIMED_SECONDS = 0.1  # calls are repeated for this long
REORDERED = (10, 15, 20, 30, 40, 80, 160, 320, 640)
ROOT = 2.0  # leaves of the first tree, as a multiple of the square root of the number of rows
KEPT = 0.9  # share of the squared length of the vectors that the PCA of the first tree keeps
SPECTRUM_ROWS = 10_000
# Changes tried on the best tree so far, one at a time; the first matter most.
CHANGES: tuple[tuple[str, Any], ...] = (
    ("leaves", 0.5), ("reduced", 0.5), ("soar", 1.5), ("leaves", 2.0), ("block", 2),
    ("threshold", 0.1), ("leaves", 2.0), ("reduced", 2.0), ("block", 4), ("block", 1),
    ("reduced", 0.0), ("spherical", False), ("threshold", 0.0), ("soar", 1.0),
)  # fmt: skip
FACTORS = ("leaves", "reduced")  # changes of these are factors


@dataclasses.dataclass(frozen=True)
class Point:
    """A measurement of a plan.

    Attributes:
      plan: settings of ScaNN.
      recall: share of the k nearest that are found.
      queries_per_second: with all queries in one call, on all cores, or with one query per call.
      build_seconds: time to build the index.
    """

    plan: Plan
    recall: float
    queries_per_second: float
    build_seconds: float


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The result of a tuning.

    Attributes:
      point: the fastest that reaches the target; the one with the highest recall if none does.
      reached: whether `point` reaches the target.
      curve: all measurements.
      engine: engine with the settings of `point`.
    """

    point: Point
    reached: bool
    curve: tuple[Point, ...]
    engine: ScannEngine

    def frontier(self) -> list[tuple[float, float]]:
        """Returns the Pareto front of (recall, queries per second)."""
        return frontier([(point.recall, point.queries_per_second) for point in self.curve])


@dataclasses.dataclass(frozen=True)
class Truth:
    """Queries and their exact results.

    Attributes:
      queries: unit vectors.
      query_rows: gallery row of each query.
      kth_best: similarity of the k-th nearest other row of each query.
      k: number of results.
    """

    queries: Float32[np.ndarray, "q d"]
    query_rows: Int64[np.ndarray, "q"]
    kth_best: Float32[np.ndarray, "q"]
    k: int

    @classmethod
    def of(cls, vectors: Float32[np.ndarray, "n d"], k: int, seed: int = 0) -> "Truth":
        """Draws random rows as queries and finds the k nearest other rows of each.

        Raises:
          UserError: k rows or fewer.
        """
        if len(vectors) <= k:
            raise UserError(f"k={k} needs more than {len(vectors)} images for a measurement")
        drawn = np.random.default_rng(seed).permutation(len(vectors))[:QUERIES]
        rows = np.sort(drawn).astype(np.int64)
        scores = exact.topk(vectors[rows], vectors, k, exclude=rows)[0]
        return cls(vectors[rows], rows, scores[:, -1], k)

    def recall(self, scores: Float32[np.ndarray, "q w"]) -> float:
        """Returns the share of the k nearest others that are among the results.

        Args:
          scores: similarities of the results; -inf for the query itself.
        """
        hit = scores >= self.kth_best[:, None] - SCORE_TOLERANCE
        return float(np.minimum(hit.sum(axis=1), self.k).mean() / self.k)


def measure(
    index: Index, records: Records, k: int = DEFAULT_K, seed: int = MEASURED_SEED
) -> dict[str, float]:
    """Measures the recall of an index relative to exact search, and its speed.

    Args:
      index: index of `records`.
      records: the gallery; random rows are searched among the others.
      k: results per query; fewer in a smaller gallery.
      seed: of the random rows; differs from that of `tune`, so that tuned settings are measured on
        other queries.

    Returns:
      `recall_at_{k}`: share of the k nearest others that are found.
      `queries_per_second`: with all queries in one call.
      `single_queries_per_second`: with one query per call.

    Raises:
      UserError: fewer than two images.
    """
    truth = Truth.of(records.vectors, max(1, min(k, len(records) - 1)), seed)
    queries, count = truth.queries, truth.k + 1  # one is the query itself
    results = index.search(queries, count)
    others = results.ids != records.ids[truth.query_rows][:, None]
    recall = truth.recall(np.where(others, results.scores, NO_RESULT))
    single = [query[None] for query in queries[:SINGLE_QUERIES]]
    return {
        f"recall_at_{k}": recall,
        "queries_per_second": len(queries) / seconds_of(lambda: index.search(queries, count)),
        "single_queries_per_second": len(single)
        / seconds_of(lambda: [index.search(query, count) for query in single]),
    }


def tune(
    vectors: Float32[np.ndarray, "n d"],
    target: float,
    k: int = DEFAULT_K,
    seconds: float = 60.0,
    single: bool = False,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Finds the fastest plan of ScaNN with at least this recall.

    Builds one index after another while there is time for one more: simple kinds for small
    galleries, a tree, then the best tree so far with one setting changed. For each number of
    re-scored candidates, finds the fewest searched leaves that reach the target.

    Args:
      vectors: unit vectors, the gallery.
      target: recall, in (0, 1].
      k: results per query.
      seconds: time budget; the first index is always measured.
      single: maximise the speed with one query per call, instead of all in one call.
      seed: of the random queries.
      note: receives lines of progress.

    Raises:
      UserError: a target outside of (0, 1], too few images, or ScaNN is not installed.
    """
    if not 0 < target <= 1:
        raise UserError(f"retrieval.target_recall={target} must lie in (0, 1]")
    began = time.perf_counter()
    truth = Truth.of(vectors, k, seed)
    points: list[Point] = []
    best: dict[str, tuple[Point, ScannEngine]] = {}  # for "tree" and "all"
    longest = 0.0
    for plan in _plans(vectors, best):
        started = time.perf_counter()
        if best and started - began + longest > seconds:
            break
        engine = ScannEngine.build(vectors, plan)
        built = time.perf_counter() - started
        measured = list(_sweep(engine, truth, target, built, single))
        points += measured
        longest = max(longest, time.perf_counter() - started)
        for name in ("all", "tree") if plan.kind == "tree" else ("all",):
            for point in measured:
                if name not in best or _better(point, best[name][0], target):
                    best[name] = point, engine
        note(f"{_plan_text(plan)}: best so far {_point_text(best['all'][0])}")
    point, engine = best["all"]
    engine = engine.with_plan(searched=point.plan.searched, reorder=point.plan.reorder, tuned=True)
    return Tuned(point, point.recall >= target, tuple(points), engine)


def _plans(
    vectors: Float32[np.ndarray, "n d"], best: Mapping[str, tuple[Point, ScannEngine]]
) -> Iterator[Plan]:
    """Yields the plans to try, which depend on the best results so far (read on each step)."""
    count, dimension = vectors.shape
    if count < scann.TREE_FROM:
        yield Plan()
    if count < 2 * scann.HASHING_FROM:
        yield Plan("hashing")
    if count < scann.HASHING_FROM // 4:
        return
    first = first_tree(vectors)
    tried = [_made(first)]
    yield first
    for name, value in CHANGES:
        so_far = best["tree"][0].plan if "tree" in best else first
        changed = round(value * getattr(so_far, name)) if name in FACTORS else value
        plan = dataclasses.replace(so_far, **{name: changed})
        valid = 2 <= plan.leaves <= count // 2 and plan.reduced < dimension
        if _made(plan) not in tried and valid:
            tried.append(_made(plan))
            yield plan


def first_tree(vectors: Float32[np.ndarray, "n d"]) -> Plan:
    """Returns the first tree to try.

    With a PCA if few dimensions are enough, and then one code per dimension: fewer rows need to be
    re-scored, which takes most of the time of a query.
    """
    reduced = enough_dimensions(vectors)
    leaves = max(2, round(ROOT * len(vectors) ** 0.5))
    return Plan("tree", leaves, 1, reduced=reduced, block=1 if reduced else 2)


def enough_dimensions(vectors: Float32[np.ndarray, "n d"]) -> int:
    """Returns a number of PCA dimensions, a multiple of 8, that keeps `KEPT`; 0 if it is large.

    Descriptors of networks vary in few directions: 89 of the 976 dimensions of a fine-tuned
    SqueezeNet have nine tenths of the squared length.
    """
    some = vectors[:: -(-len(vectors) // SPECTRUM_ROWS)]
    energies = np.linalg.eigvalsh(some.T @ some / len(some))[::-1]
    enough = int(np.searchsorted(np.cumsum(energies), KEPT * energies.sum())) + 1
    reduced = -(-enough // 8) * 8
    return reduced if reduced <= vectors.shape[1] // 2 else 0


def _made(plan: Plan) -> Plan:
    """Returns the plan without the settings that can be changed after building."""
    return dataclasses.replace(plan, searched=1, reorder=1)


def _sweep(
    engine: ScannEngine, truth: Truth, target: float, built: float, single: bool
) -> Iterator[Point]:
    """Measures settings of one index with recalls on both sides of the target."""
    if engine.plan.kind == "brute_force":
        yield _point(engine, truth, built, single)
        return
    for reorder in REORDERED:
        changed = engine.with_plan(reorder=reorder)
        if engine.plan.kind == "hashing":
            points = [_point(changed, truth, built, single)]
        else:
            points = list(_fewest_leaves(changed, truth, target, built, single))
        yield from points
        if engine.plan.kind == "hashing" and points[0].recall >= target:
            return


def _fewest_leaves(
    engine: ScannEngine, truth: Truth, target: float, built: float, single: bool
) -> Iterator[Point]:
    """Finds the fewest leaves that reach the target by bisection; measures there and just below."""
    low, high = 0, engine.plan.leaves
    if _recall(engine.with_plan(searched=high), truth) < target:
        # Too few candidates are re-scored, with any number of leaves.
        if engine.plan.reorder == REORDERED[-1]:
            yield _point(engine.with_plan(searched=high), truth, built, single)
        return
    while high - low > max(1, high // 16):
        middle = (low + high) // 2 if low else max(1, high // 4)
        if _recall(engine.with_plan(searched=middle), truth) >= target:
            high = middle
        else:
            low = middle
    for searched in sorted({max(1, low), high}):
        yield _point(engine.with_plan(searched=searched), truth, built, single)


def _recall(engine: ScannEngine, truth: Truth) -> float:
    rows, scores = engine.search(truth.queries, truth.k + 1, None)
    return truth.recall(np.where(rows == truth.query_rows[:, None], NO_RESULT, scores))


def _point(engine: ScannEngine, truth: Truth, built: float, single: bool) -> Point:
    k = truth.k + 1  # one is the query itself
    if single:
        queries = [query[None] for query in truth.queries[:SINGLE_QUERIES]]
        seconds = seconds_of(lambda: [engine.search(query, k, None) for query in queries])
        speed = len(queries) / seconds
    else:
        speed = len(truth.queries) / seconds_of(lambda: engine.search(truth.queries, k, None))
    return Point(engine.plan, _recall(engine, truth), speed, built)


def _better(point: Point, best: Point, target: float) -> bool:
    if point.recall >= target and best.recall >= target:
        return point.queries_per_second > best.queries_per_second
    return point.recall > best.recall


def frontier(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the Pareto front of points (recall, speed), by ascending recall."""
    kept: list[tuple[float, float]] = []
    for recall, speed in sorted(curve, reverse=True):
        if not kept or speed > kept[-1][1]:
            kept.append((recall, speed))
    return kept[::-1]


def seconds_of(call: Callable[[], Any]) -> float:
    """Returns the seconds of the fastest call among those made in `TIMED_SECONDS`."""
    spent, fastest = 0.0, float("inf")
    while spent < TIMED_SECONDS:
        started = time.perf_counter()
        call()
        elapsed = time.perf_counter() - started
        spent, fastest = spent + elapsed, min(fastest, elapsed)
    return fastest


def _plan_text(plan: Plan) -> str:
    if plan.kind != "tree":
        return plan.kind.replace("_", " ")
    usual = Plan()
    more = [f"PCA {plan.reduced}"] if plan.reduced else []
    more += [f"SOAR {plan.soar:g}"] if plan.soar else []
    more += [f"threshold {plan.threshold:g}"] if plan.threshold != usual.threshold else []
    more += [f"block {plan.block}"] if plan.block != usual.block else []
    more += [] if plan.spherical else ["plain k-means"]
    return ", ".join([f"tree of {plan.leaves} leaves", *more])


def _point_text(point: Point) -> str:
    return f"recall {point.recall:.4f}, {point.queries_per_second:,.0f} queries/s"
