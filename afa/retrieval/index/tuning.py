"""How an index performs, and which settings reach a recall at the highest speed: by measurement.

Truth is exact search. Queries are rows of the gallery, each searched among the others, so that
they are of the user's own data without being their own answer.
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
from afa.retrieval.index.contract import DEFAULT_K, NOTHING, Index
from afa.retrieval.index.scann import Plan, ScannEngine
from afa.retrieval.records import Records

QUERIES = 1000  # a share of them that is missed is told to 0.1 %
SINGLE_QUERIES = 200  # enough to time them one by one
SCORE_TOLERANCE = 1e-5  # an equal similarity counts: copies of an image stand for each other
MEASURED_SEED = 1
TIMED_SECONDS = 0.1  # a measurement repeats until it took this long
REORDERED = (10, 15, 20, 30, 40, 80, 160, 320, 640)
ROOT = 2.0  # leaves of the first tree, in square roots of the number of rows
KEPT = 0.9  # of the squared length of vectors in the dimensions that the first tree sees
SPECTRUM_ROWS = 10_000
# What is changed of the best tree so far, one thing after the other; the first kinds matter most.
CHANGES: tuple[tuple[str, Any], ...] = (
    ("leaves", 0.5), ("reduced", 0.5), ("soar", 1.5), ("leaves", 2.0), ("block", 2),
    ("threshold", 0.1), ("leaves", 2.0), ("reduced", 2.0), ("block", 4), ("block", 1),
    ("reduced", 0.0), ("spherical", False), ("threshold", 0.0), ("soar", 1.0),
)  # fmt: skip
FACTORS = ("leaves", "reduced")  # of these a change is a factor


@dataclasses.dataclass(frozen=True)
class Point:
    """What a plan reaches.

    Attributes:
      plan: of ScaNN.
      recall: share of the k nearest that are found.
      queries_per_second: all queries in one call, on all cores; or one after the other.
      build_seconds: of the index under it.
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
      reached: whether it does.
      curve: everything that was measured.
      engine: the searcher of `point`, ready for use.
    """

    point: Point
    reached: bool
    curve: tuple[Point, ...]
    engine: ScannEngine

    def frontier(self) -> list[tuple[float, float]]:
        """Recall and queries a second of what no other point beats in both."""
        return frontier([(point.recall, point.queries_per_second) for point in self.curve])


@dataclasses.dataclass(frozen=True)
class Truth:
    """Queries and what is to be found: row of each query itself, and its k-th best similarity."""

    queries: Float32[np.ndarray, "q d"]
    own: Int64[np.ndarray, "q"]
    worst: Float32[np.ndarray, "q"]
    k: int

    @classmethod
    def of(cls, vectors: Float32[np.ndarray, "n d"], k: int, seed: int = 0) -> "Truth":
        """Draws rows, and finds the k nearest others of each.

        Raises:
          UserError: no more than k rows.
        """
        if len(vectors) <= k:
            raise UserError(f"k={k} needs more than {len(vectors)} images to be measured with")
        drawn = np.random.default_rng(seed).permutation(len(vectors))[:QUERIES]
        own = np.sort(drawn).astype(np.int64)
        scores = exact.topk(vectors[own], vectors, k, exclude=own)[0]
        return cls(vectors[own], own, scores[:, -1], k)

    def recall(self, scores: Float32[np.ndarray, "q w"]) -> float:
        """Share of the k nearest others among results, -inf where it is the query itself."""
        hit = scores >= self.worst[:, None] - SCORE_TOLERANCE
        return float(np.minimum(hit.sum(axis=1), self.k).mean() / self.k)


def measure(
    index: Index, records: Records, k: int = DEFAULT_K, seed: int = MEASURED_SEED
) -> dict[str, float]:
    """What an index loses against exact search, and how fast it answers.

    Args:
      index: over `records`.
      records: the gallery; drawn rows of it are searched among the others.
      k: results a query; fewer where there are no more others.
      seed: of the draw; not that of `tune`, so that what was chosen is measured on other queries.

    Returns:
      `recall_at_{k}`: share of the k nearest others that are found.
      `queries_per_second`: all queries in one call.
      `single_queries_per_second`: one query a call.

    Raises:
      UserError: fewer than two images.
    """
    truth = Truth.of(records.vectors, max(1, min(k, len(records) - 1)), seed)
    queries, wanted = truth.queries, truth.k + 1  # one is the query itself
    found = index.search(queries, wanted)
    others = found.ids != records.ids[truth.own][:, None]
    recall = truth.recall(np.where(others, found.scores, NOTHING))
    alone = [query[None] for query in queries[:SINGLE_QUERIES]]
    return {
        f"recall_at_{k}": recall,
        "queries_per_second": len(queries) / seconds_of(lambda: index.search(queries, wanted)),
        "single_queries_per_second": len(alone)
        / seconds_of(lambda: [index.search(query, wanted) for query in alone]),
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
    """The fastest plan of ScaNN with at least this recall.

    Kinds of index are built one after the other while the time allows another one of the same
    size: the simple ones where the gallery is small, a tree, and then the best tree so far with
    one thing changed. For each, the least leaves that reach the target are looked for with every
    number of candidates that are compared exactly.

    Args:
      vectors: unit vectors, the gallery.
      target: recall, in (0, 1].
      k: results a query.
      seconds: time budget; the first kind is measured whatever it takes.
      single: speed of one query after the other, rather than of all in one call.
      seed: of the draw of queries.
      note: is told what is done.

    Raises:
      UserError: a target outside of (0, 1], too few images, or no ScaNN.
    """
    if not 0 < target <= 1:
        raise UserError(f"retrieval.target_recall={target} must lie in (0, 1]")
    began = time.perf_counter()
    truth = Truth.of(vectors, k, seed)
    points: list[Point] = []
    best: dict[str, tuple[Point, ScannEngine]] = {}  # of trees, and of all
    longest = 0.0
    for plan in _kinds(vectors, best):
        started = time.perf_counter()
        if best and started - began + longest > seconds:
            break
        engine = ScannEngine.build(vectors, plan)
        built = time.perf_counter() - started
        found = list(_sweep(engine, truth, target, built, single))
        points += found
        longest = max(longest, time.perf_counter() - started)
        for name in ("all", "tree") if plan.kind == "tree" else ("all",):
            for point in found:
                if name not in best or _better(point, best[name][0], target):
                    best[name] = point, engine
        note(f"{_words(plan)}: best so far {_told(best['all'][0])}")
    point, engine = best["all"]
    asked = engine.with_plan(searched=point.plan.searched, reorder=point.plan.reorder, tuned=True)
    return Tuned(point, point.recall >= target, tuple(points), asked)


def _kinds(
    vectors: Float32[np.ndarray, "n d"], best: Mapping[str, tuple[Point, ScannEngine]]
) -> Iterator[Plan]:
    """What is worth building over these rows, given the best so far when it is asked for."""
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
        sound = 2 <= plan.leaves <= count // 2 and plan.reduced < dimension
        if _made(plan) not in tried and sound:
            tried.append(_made(plan))
            yield plan


def first_tree(vectors: Float32[np.ndarray, "n d"]) -> Plan:
    """Over a PCA where few dimensions are enough, and then a code for each of them: fewer rows need
    to be compared exactly, which costs most of a query."""
    reduced = enough_dimensions(vectors)
    leaves = max(2, round(ROOT * len(vectors) ** 0.5))
    return Plan("tree", leaves, 1, reduced=reduced, block=1 if reduced else 2)


def enough_dimensions(vectors: Float32[np.ndarray, "n d"]) -> int:
    """Dimensions of a PCA, a multiple of 8, that keep most of the vectors; 0 where most are needed.

    What a network describes lies in few directions: of 976 dimensions of a fine-tuned SqueezeNet 89
    hold nine tenths.
    """
    some = vectors[:: -(-len(vectors) // SPECTRUM_ROWS)]
    energies = np.linalg.eigvalsh(some.T @ some / len(some))[::-1]
    enough = int(np.searchsorted(np.cumsum(energies), KEPT * energies.sum())) + 1
    reduced = -(-enough // 8) * 8
    return reduced if reduced <= vectors.shape[1] // 2 else 0


def _made(plan: Plan) -> Plan:
    """What of a plan goes into building."""
    return dataclasses.replace(plan, searched=1, reorder=1)


def _sweep(
    engine: ScannEngine, truth: Truth, target: float, built: float, single: bool
) -> Iterator[Point]:
    """Points of one index on both sides of the target."""
    if engine.plan.kind == "brute_force":
        yield _point(engine, truth, built, single)
        return
    for reorder in REORDERED:
        asked = engine.with_plan(reorder=reorder)
        if engine.plan.kind == "hashing":
            points = [_point(asked, truth, built, single)]
        else:
            points = list(_fewest_leaves(asked, truth, target, built, single))
        yield from points
        if engine.plan.kind == "hashing" and points[0].recall >= target:
            return


def _fewest_leaves(
    engine: ScannEngine, truth: Truth, target: float, built: float, single: bool
) -> Iterator[Point]:
    """Halves the interval in which the fewest leaves with the target lie, measuring as it goes."""
    low, high = 0, engine.plan.leaves
    if _recall(engine.with_plan(searched=high), truth) < target:
        # Whatever is searched, too few candidates are compared exactly.
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
    return truth.recall(np.where(rows == truth.own[:, None], NOTHING, scores))


def _point(engine: ScannEngine, truth: Truth, built: float, single: bool) -> Point:
    k = truth.k + 1  # one is the query itself
    if single:
        alone = [query[None] for query in truth.queries[:SINGLE_QUERIES]]
        spent = seconds_of(lambda: [engine.search(query, k, None) for query in alone])
        speed = len(alone) / spent
    else:
        speed = len(truth.queries) / seconds_of(lambda: engine.search(truth.queries, k, None))
    return Point(engine.plan, _recall(engine, truth), speed, built)


def _better(point: Point, best: Point, target: float) -> bool:
    if point.recall >= target and best.recall >= target:
        return point.queries_per_second > best.queries_per_second
    return point.recall > best.recall


def frontier(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (recall, speed) that no other beats in both, by rising recall."""
    kept: list[tuple[float, float]] = []
    for recall, speed in sorted(curve, reverse=True):
        if not kept or speed > kept[-1][1]:
            kept.append((recall, speed))
    return kept[::-1]


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call: the fastest of as many as it takes to fill the time of a measurement."""
    spent, fastest = 0.0, float("inf")
    while spent < TIMED_SECONDS:
        started = time.perf_counter()
        call()
        took = time.perf_counter() - started
        spent, fastest = spent + took, min(fastest, took)
    return fastest


def _words(plan: Plan) -> str:
    if plan.kind != "tree":
        return plan.kind.replace("_", " ")
    usual = Plan()
    more = [f"PCA {plan.reduced}"] if plan.reduced else []
    more += [f"SOAR {plan.soar:g}"] if plan.soar else []
    more += [f"threshold {plan.threshold:g}"] if plan.threshold != usual.threshold else []
    more += [f"block {plan.block}"] if plan.block != usual.block else []
    more += [] if plan.spherical else ["plain k-means"]
    return ", ".join([f"tree of {plan.leaves} leaves", *more])


def _told(point: Point) -> str:
    return f"recall {point.recall:.4f}, {point.queries_per_second:,.0f} queries/s"
