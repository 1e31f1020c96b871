"""Speed of search compared with faiss and hnswlib: `python -m experiments.benchmarks.search`.

Every library builds its index in its own process over the same vectors, with the same time to try
settings. For each index, the fastest settings that reach a recall@10 are timed: queries per second
on one core, all in one call and one per call. Exact search is compared with faiss on all cores, or
on an accelerator with PyTorch, and the overhead of afa's index interface is measured against plain
ScaNN; these alternate. Needs the extra `bench`.
"""

import argparse
import dataclasses
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afa.errors import UserError, choose
from experiments.cli import Parser, note, perform

PROGRAM = "python -m experiments.benchmarks.search"
K = 10
TARGETS = (0.90, 0.95, 0.99)
QUERIES, SINGLE = 1000, 300
AGREEING = 0.999  # equal results of two exact searches; equal similarities may be in another order
MOST_CORES = 1.1  # cores in use at most while one core is timed
LATENT, NOISE = 32, 0.1  # clustered vectors: latent dimensions, and noise in all dimensions


@dataclasses.dataclass(frozen=True)
class Best:
    """The fastest settings of a library that reach a recall.

    Attributes:
      kind: settings of index and search, as text.
      recall: measured recall.
      speed: queries per second on one core; 0 if the recall was not reached.
      build_seconds: time to build the index on all cores.
      megabytes: memory of the index beside the vectors.
    """

    kind: str = "not reached"
    recall: float = 0.0
    speed: float = 0.0
    build_seconds: float = 0.0
    megabytes: float = 0.0


Found = dict[str, dict[float, Best]]  # "batch" or "single" -> recall -> best


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    add = options.add_argument
    add("--rows", nargs="+", type=int, default=[100_000], help="number of gallery vectors")
    add("--dimensions", nargs="+", type=int, default=[128, 512], help="dimension of the vectors")
    add("--embeddings", type=Path, default=None, metavar="DIR",
        help="use the vectors of an export or index instead")  # fmt: skip
    add("--engines", default="", help="comma-separated names (default: all)")
    add("--seconds", type=float, default=120.0, help="time of each library to try settings")
    add("--parts", default="approximate,exact,layer", help="comma-separated parts to measure")
    add("--page", type=Path, default=None, metavar="FILE", help="write recall over speed as HTML")
    options.add_out()
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    from afa import parallel
    from afa.io import write_json
    from experiments.benchmarks.engines import ENGINES

    names = [name for name in chosen.engines.split(",") if name] or list(ENGINES)
    for name in names:
        choose("--engines", name, ENGINES)
    parts = chosen.parts.split(",")
    for part in parts:
        choose("--parts", part, PARTS)
    _require_libraries(parts, names)
    results = {}
    for title, vectors, queries in _sets(chosen):
        print(f"\n{title}: {parallel.platform()}, {os.cpu_count()} cores")
        arguments = vectors, queries, names, chosen.seconds
        results[title] = {part: PARTS[part](title, *arguments) for part in parts}
    if chosen.page:
        _write_page(chosen.page, results)
    if chosen.out:
        write_json(chosen.out, {"hardware": parallel.platform(), "sets": results})
    return 0


def _require_libraries(parts: Sequence[str], names: Sequence[str]) -> None:
    from afa import parallel
    from experiments.benchmarks.engines import LIBRARIES

    needed = {
        "exact": {"torch" if parallel.accelerated() else "faiss"},
        "layer": {"scann"},
        "approximate": {LIBRARIES[n] for n in names},
    }
    wanted = sorted({library for part in parts for library in needed[part]})
    missing = [library for library in wanted if importlib.util.find_spec(library) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed: pip install 'afa[bench]'")


# ---- vectors -----------------------------------------------------------------------------------


def _sets(chosen: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    if chosen.embeddings is not None:
        from afa.retrieval.export import read_export

        vectors = read_export(chosen.embeddings)[0].vectors
        order = np.random.default_rng(0).permutation(len(vectors))
        queries, gallery = np.split(vectors[order], [QUERIES])
        title = f"{len(gallery):,} x {vectors.shape[1]}, real"
        yield title, np.ascontiguousarray(gallery), queries
        return
    for rows in chosen.rows:
        for dimension in chosen.dimensions:
            drawn = clustered(rows + QUERIES, dimension)
            yield f"{rows:,} x {dimension}, clustered", drawn[QUERIES:], drawn[:QUERIES].copy()


def clustered(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    """Makes clustered unit vectors: 100 per class, in a subspace of `LATENT` dimensions plus
    noise."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(max(1, rows // 100), LATENT))
    projection = random.normal(size=(LATENT, dimension)).astype(np.float32) / LATENT**0.5
    parts = []
    for begin in range(0, rows, 100_000):
        count = min(100_000, rows - begin)
        latent = centres[random.integers(len(centres), size=count)]
        latent = (latent + 0.6 * random.normal(size=latent.shape)).astype(np.float32)
        part = latent @ projection
        part += NOISE * random.standard_normal(part.shape, np.float32)
        parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
    return np.concatenate(parts)


# ---- approximate search ------------------------------------------------------------------------


def _approximate(
    title: str, vectors: np.ndarray, queries: np.ndarray, names: Sequence[str], seconds: float
) -> dict[str, Any]:
    from afa.retrieval import exact

    truth = exact.topk(queries, vectors, K)[0][:, -1]
    found: dict[str, Found] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        np.save(path, vectors)
        for name in names:
            arguments = name, str(path), queries, truth, seconds
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # its own memory
                found[name], curves[name] = pool.apply(measure, arguments)
            note(f"  {name}: measured")
    _print_approximate(title, found)
    return {
        name: {
            "best": {way: {str(t): dataclasses.asdict(b) for t, b in best.items()}
                     for way, best in each.items()},
            "curve": curves[name],
        }
        for name, each in found.items()
    }  # fmt: skip


def measure(
    name: str, path: str, queries: np.ndarray, truth: np.ndarray, seconds: float
) -> tuple[Found, list[tuple[float, float]]]:
    """Builds and times indexes of one engine until the time is used up.

    Args:
      name: engine, a key of `ENGINES`.
      path: file of the gallery vectors.
      queries: unit vectors.
      truth: similarity of the k-th exact result of each query.
      seconds: time limit.

    Returns:
      The best settings, and (recall, speed) of all settings with all queries in one call.
    """
    from experiments.benchmarks.engines import ENGINES

    vectors = np.load(path)
    best: Found = {way: {target: Best() for target in TARGETS} for way in ("batch", "single")}
    curve: list[tuple[float, float]] = []
    began, longest = time.perf_counter(), 0.0
    before, started = _memory(), began
    for built in ENGINES[name](vectors):
        build, megabytes = time.perf_counter() - started, (_memory() - before) / 2**20
        for target in TARGETS:
            for effort, reorder, recall in _least(built, vectors, queries, truth, target):
                search = built.search(effort, reorder)
                kind = f"{built.kind}, effort {effort}" + (f", {reorder} exact" if reorder else "")
                for way, speed in _speeds(search, queries).items():
                    if way == "batch":
                        curve.append((recall, speed))
                    if speed > best[way][target].speed:
                        best[way][target] = Best(kind, recall, speed, build, megabytes)
        longest = max(longest, time.perf_counter() - started)
        del built
        if time.perf_counter() - began + longest > seconds:
            break
        before, started = _memory(), time.perf_counter()
    return best, curve


def _least(
    built: Any, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray, target: float
) -> Iterator[tuple[int, int, float]]:
    """The least effort that reaches a recall, for each number of re-scored candidates."""
    for reorder in built.reorder:
        low, high = 0, len(built.effort) - 1
        recall = _recall(built.search(built.effort[high], reorder), vectors, queries, truth)
        if recall < target:
            continue
        while low < high:
            middle = (low + high) // 2
            recall = _recall(built.search(built.effort[middle], reorder), vectors, queries, truth)
            low, high = (low, middle) if recall >= target else (middle + 1, high)
        effort = built.effort[high]
        yield effort, reorder, _recall(built.search(effort, reorder), vectors, queries, truth)


def _recall(search: Callable, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> float:
    """Share of the exact k best that are found; ties count as found."""
    ids = search(queries, K).astype(np.int64)
    scores = np.einsum("qkd,qd->qk", vectors[np.maximum(ids, 0)], queries)
    return float(((ids >= 0) & (scores >= truth[:, None] - 1e-5)).mean())


def _speeds(search: Callable, queries: np.ndarray) -> dict[str, float]:
    """Queries per second in one call ("batch") and one query per call ("single")."""
    from afa.retrieval.index.tuning import seconds_of

    single = [query[None] for query in queries[:SINGLE]]
    wall, cpu = time.perf_counter(), time.process_time()
    speeds = {
        "batch": len(queries) / seconds_of(lambda: search(queries, K)),
        "single": len(single) / seconds_of(lambda: [search(query, K) for query in single]),
    }
    cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
    if cores > MOST_CORES:
        raise AssertionError(f"{cores:.2f} cores were in use, but speeds are for one core")
    return speeds


def _memory() -> int:
    """Bytes of anonymous memory of the process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024


def _print_approximate(title: str, found: dict[str, Found]) -> None:
    from afa.console import table

    columns = ["recall@10", "library", "queries/s", "of the fastest", "recall", "build s", "MiB",
               "how"]  # fmt: skip
    ways = {"batch": "all queries in one call", "single": "one query per call"}
    for way, label in ways.items():
        lines = []
        for target in TARGETS:
            fastest = max(each[way][target].speed for each in found.values()) or 1.0
            for name, each in found.items():
                best = each[way][target]
                lines.append([
                    f"{target:.2f}", name, f"{best.speed:,.0f}", f"{best.speed / fastest:.2f}",
                    f"{best.recall:.3f}", f"{best.build_seconds:.0f}", f"{best.megabytes:,.0f}",
                    best.kind,
                ])  # fmt: skip
        table(f"{title}: {label}, one core", lines, columns)


# ---- exact search, and the overhead of the index interface -------------------------------------


def _exact(
    title: str, vectors: np.ndarray, queries: np.ndarray, names: Sequence[str], seconds: float
) -> dict[str, Any]:
    from afa import parallel
    from afa.retrieval import exact

    gallery = exact.Gallery(vectors)
    calls: dict[str, Callable[[], Any]] = {
        "afa exact://": lambda: exact.topk(queries, gallery, K),
        **(_torch_exact(vectors, queries) if parallel.accelerated() else _faiss(vectors, queries)),
    }
    (_, ours), (_, theirs) = (call() for call in calls.values())
    if not (agreeing := float((ours == theirs).mean())) > AGREEING:
        raise UserError(f"the implementations disagree: {agreeing:.2%} of the results are equal")
    return _alternate(f"{title}: exact search", calls, len(queries), turns=5)


def _faiss(vectors: np.ndarray, queries: np.ndarray) -> dict[str, Callable[[], Any]]:
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    return {"faiss Flat": lambda: flat.search(queries, K)}


def _torch_exact(vectors: np.ndarray, queries: np.ndarray) -> dict[str, Callable[[], Any]]:
    """A float32 product and `topk` of PyTorch, with the gallery on the device."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gallery = torch.from_numpy(vectors).to(device).T

    def search() -> tuple[np.ndarray, np.ndarray]:
        found = (torch.from_numpy(queries).to(device) @ gallery).topk(K)
        return found.values.cpu().numpy(), found.indices.cpu().numpy()

    return {"torch topk": search}


def _layer(
    title: str, vectors: np.ndarray, queries: np.ndarray, names: Sequence[str], seconds: float
) -> dict[str, Any]:
    from afa.retrieval.index.local import LocalIndex
    from afa.retrieval.index.scann import Plan, ScannEngine
    from afa.retrieval.records import Records
    from experiments.benchmarks.engines import unchanged

    leaves = round(2 * len(vectors) ** 0.5)
    engine = ScannEngine.build(vectors, Plan("tree", leaves, max(1, leaves // 40), reorder=40))
    searcher, plan = engine.searcher, engine.plan
    rows = Records.of(vectors, np.arange(len(vectors)))
    index = LocalIndex("scann://", unchanged, rows, {}, engine, len(vectors))
    reorder = plan.candidates(K)
    batch = {
        "afa scann://": lambda: index.search(queries, K),
        "ScaNN": lambda: searcher.search_batched_parallel(queries, K, reorder, plan.searched),
    }
    rows_of_one = [query[None] for query in queries[:SINGLE]]
    single = {
        "afa scann://": lambda: [index.search(query, K) for query in rows_of_one],
        "ScaNN": lambda: [
            searcher.search(query[0], K, reorder, plan.searched) for query in rows_of_one
        ],
    }
    name = f"{title}: index interface"
    return {
        "batch": _alternate(f"{name}, all in one call", batch, len(queries), turns=30),
        "single": _alternate(f"{name}, one query per call", single, len(rows_of_one), turns=30),
    }


def _alternate(
    title: str, calls: dict[str, Callable[[], Any]], queries: int, turns: int
) -> dict[str, Any]:
    """Times both calls alternately; the ratio is between consecutive calls."""
    from afa.console import table

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(turns):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    (first, first_seconds), (second, second_seconds) = seconds.items()
    ratios = np.array(second_seconds) / np.array(first_seconds)
    speeds = {name: queries / float(np.median(each)) for name, each in seconds.items()}
    spread = [float(value) for value in np.percentile(ratios, [50, 10, 90])]
    lines = [[name, f"{speed:,.0f}"] for name, speed in speeds.items()]
    lines.append([f"{first} / {second}", f"{spread[0]:.2f} ({spread[1]:.2f} to {spread[2]:.2f})"])
    table(title, lines, ["", "queries/s"])
    return {"queries_per_second": speeds, "ratio": spread}


Part = Callable[[str, np.ndarray, np.ndarray, Sequence[str], float], dict[str, Any]]
PARTS: dict[str, Part] = {"approximate": _approximate, "exact": _exact, "layer": _layer}


def _write_page(path: Path, results: dict[str, Any]) -> None:
    from markupsafe import escape

    from afa.io import write_bytes
    from afa.report.charts import Line, key, line_chart
    from afa.retrieval.index.tuning import frontier

    out = ["<!doctype html><meta charset=utf-8><title>Recall and speed</title>",
        "<style>body{font:15px system-ui;margin:2em}svg.chart{width:34em}</style>",
           "<h1>Thousand queries per second on one core over recall@10 (%)</h1>"]  # fmt: skip
    for title, parts in results.items():
        lines = []
        for style, (name, each) in enumerate(parts.get("approximate", {}).items()):
            curve = frontier(each["curve"])
            points = [(100 * recall, speed / 1000) for recall, speed in curve if recall > 0.85]
            lines.append(Line(name, points, style, name.startswith("afa")))
        if any(line.points for line in lines):
            legend = " ".join(f"{key(n.style, n.strong, True)} {escape(n.name)}" for n in lines)
            chart = line_chart(lines, f"{title}: speed by recall", markers=True)
            out += [f"<h2>{escape(title)}</h2><p>{legend}</p>{chart}"]
    write_bytes(path, "\n".join(out).encode())


if __name__ == "__main__":
    sys.exit(main())
