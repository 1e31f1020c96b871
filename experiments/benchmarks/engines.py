"""The search libraries that `experiments.benchmarks.search` compares, behind one interface."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from afa.retrieval.index import tuning

LEAVES = (2.0, 1.0, 4.0)  # in square roots of the number of rows
LINKS = (16, 32)  # of a node of a graph
EF_CONSTRUCTION = 200
REORDERED = (12, 16, 20, 30, 40, 80, 160, 320)
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

# queries, k -> ids
Ask = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Built:
    """An index that was built, and how it can be asked.

    Attributes:
      kind: how it was built, in words.
      effort: ascending; more finds more (leaves, probes, length of the list of candidates).
      reorder: candidates that are compared exactly; (0,) where there is no such stage.
      ask: of an effort and a number of candidates.
    """

    kind: str
    effort: Sequence[int]
    reorder: Sequence[int]
    ask: Callable[[int, int], Ask]


def ours(vectors: np.ndarray) -> Iterator[Built]:
    """afa's scann://, through its own contract."""
    from afa.retrieval.index.local import LocalIndex
    from afa.retrieval.index.scann import ScannEngine
    from afa.retrieval.records import Records

    rows = Records.of(vectors, np.arange(len(vectors)))
    for plan in _trees(vectors):
        engine = ScannEngine.build(vectors, plan, threads=1)

        def ask(searched: int, reorder: int, engine: ScannEngine = engine) -> Ask:
            asked = engine.with_plan(searched=searched, reorder=reorder)
            index = LocalIndex("scann://", unchanged, rows, {}, asked, len(vectors))
            return lambda queries, k: index.search(queries, k).ids

        effort = [step for step in STEPS if step < plan.leaves] + [plan.leaves]
        words = f"{plan.leaves} leaves, {_over(plan.reduced)}, {plan.block} a code"
        yield Built(f"{words}, SOAR {plan.soar:g}", effort, REORDERED, ask)


def _trees(vectors: np.ndarray) -> Iterator[Any]:
    """What the tuning tries first, and its first changes."""
    first = tuning.first_tree(vectors)
    change = functools.partial(dataclasses.replace, first)
    half = round(first.leaves / 2)
    plans = (
        first, change(leaves=half), change(leaves=half, reduced=first.reduced // 2),
        change(soar=1.5), change(block=2), change(block=2, soar=1.5), change(block=2, reduced=0),
    )  # fmt: skip
    yield from dict.fromkeys(plans)


def _over(reduced: int) -> str:
    return f"PCA {reduced}" if reduced else "whole"


def faiss_ivfpq(vectors: np.ndarray) -> Iterator[Built]:
    """IVFPQ with 4-bit fast scan, refined by exact products; over the same PCA with one and two
    dimensions a code, as ScaNN, and over whole vectors with two."""
    import faiss

    rows, dimension = vectors.shape
    enough = tuning.enough_dimensions(vectors)
    forms = ((enough, 1), (enough, 2), (0, 2)) if enough else ((0, 2),)
    for root in LEAVES:
        for reduced, block in forms:
            cells = round(root * rows**0.5)
            words = f"IVF{cells},PQ{(reduced or dimension) // block}x4fs"
            inner = faiss.index_factory(reduced or dimension, words, faiss.METRIC_INNER_PRODUCT)
            index = _filled(vectors, inner, reduced)
            effort = [step for step in STEPS if step < cells] + [cells]
            ask = _asking(index, inner, "nprobe")
            yield Built(f"{_over(reduced)}, {words}, refined", effort, REORDERED, ask)


def faiss_hnsw(vectors: np.ndarray) -> Iterator[Built]:
    """Navigable small worlds (Malkov and Yashunin 2016) of faiss; over the same PCA refined by
    exact products, and over whole vectors."""
    import faiss

    dimension = vectors.shape[1]
    reduced = tuning.enough_dimensions(vectors)
    effort = [step for step in STEPS if step >= 12]
    few, many = LINKS
    for kept, links in dict.fromkeys(((reduced, few), (0, few), (reduced // 2, few), (0, many))):
        graph = faiss.IndexHNSWFlat(kept or dimension, links, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        index = _filled(vectors, graph, kept, refined=kept > 0)
        ask = _asking(index, graph.hnsw, "efSearch")
        yield Built(f"{_over(kept)}, M {links}", effort, REORDERED if kept else (0,), ask)


def _filled(vectors: np.ndarray, inner: Any, reduced: int, refined: bool = True) -> Any:
    """An index of faiss over a PCA, where one is wanted; its results compared exactly."""
    import faiss

    index = inner
    if reduced:
        # Of second moments, as ScaNN's: taking the mean away would change inner products.
        some = vectors[:: -(-len(vectors) // tuning.SPECTRUM_ROWS)]
        axes = np.linalg.eigh(some.T @ some)[1][:, ::-1][:, :reduced]
        turn = faiss.LinearTransform(vectors.shape[1], reduced, False)
        faiss.copy_array_to_vector(np.ascontiguousarray(axes.T).ravel(), turn.A)
        turn.is_trained = True
        index = faiss.IndexPreTransform(turn, inner)
    if refined:
        index = faiss.IndexRefineFlat(index)
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    index.train(vectors)
    index.add(vectors)
    faiss.omp_set_num_threads(1)
    return index


def _asking(index: Any, inner: Any, effort_is: str) -> Callable[[int, int], Ask]:
    def ask(effort: int, reorder: int) -> Ask:
        def search(queries: np.ndarray, k: int) -> np.ndarray:
            setattr(inner, effort_is, effort)
            if reorder:
                index.k_factor = reorder / k
            return index.search(queries, k)[1]

        return search

    return ask


def hnswlib(vectors: np.ndarray) -> Iterator[Built]:
    """The same of its authors' own library."""
    import hnswlib as library

    for links in LINKS:
        index = library.Index(space="ip", dim=vectors.shape[1])
        index.init_index(max_elements=len(vectors), ef_construction=EF_CONSTRUCTION, M=links)
        index.set_num_threads(os.cpu_count() or 1)
        index.add_items(vectors)
        index.set_num_threads(1)

        def ask(length: int, reorder: int, index: Any = index) -> Ask:
            def search(queries: np.ndarray, k: int) -> np.ndarray:
                index.set_ef(length)
                return index.knn_query(queries, k)[0]

            return search

        yield Built(f"M {links}", [step for step in STEPS if step >= 12], (0,), ask)


ENGINES: dict[str, Callable[[np.ndarray], Iterator[Built]]] = {
    "afa scann://": ours,
    "faiss IVFPQ": faiss_ivfpq,
    "faiss HNSW": faiss_hnsw,
    "hnswlib": hnswlib,
}
LIBRARIES = {  # which each of them needs
    "afa scann://": "scann", "faiss IVFPQ": "faiss", "faiss HNSW": "faiss", "hnswlib": "hnswlib",
}  # fmt: skip


def unchanged(vectors: np.ndarray) -> Any:
    """Builds nothing: no index here is ever changed."""
    raise AssertionError("nothing is added or removed here")
