"""Search libraries that `experiments.benchmarks.search` compares, behind one interface."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from afa.retrieval.index import tuning

LEAVES = (2.0, 1.0, 4.0)  # multiples of the square root of the number of rows
LINKS = (16, 32)  # links per node of a graph
EF_CONSTRUCTION = 200
REORDERED = (12, 16, 20, 30, 40, 80, 160, 320)
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

# queries, k -> ids
Search = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Built:
    """A built index and its search settings.

    Attributes:
      kind: settings of the index, as text.
      effort: values of the setting that trades speed for recall (leaves, probes, length of the
        candidate list), ascending.
      reorder: numbers of candidates that are re-scored exactly; (0,) without this stage.
      search: effort, number of candidates -> search function.
    """

    kind: str
    effort: Sequence[int]
    reorder: Sequence[int]
    search: Callable[[int, int], Search]


def ours(vectors: np.ndarray) -> Iterator[Built]:
    """afa's scann:// engine, through the index interface."""
    from afa.retrieval.index.local import LocalIndex
    from afa.retrieval.index.scann import ScannEngine
    from afa.retrieval.records import Records

    rows = Records.of(vectors, np.arange(len(vectors)))
    for plan in _trees(vectors):
        engine = ScannEngine.build(vectors, plan, threads=1)

        def search(searched: int, reorder: int, engine: ScannEngine = engine) -> Search:
            with_settings = engine.with_plan(searched=searched, reorder=reorder)
            index = LocalIndex("scann://", unchanged, rows, {}, with_settings, len(vectors))
            return lambda queries, k: index.search(queries, k).ids

        effort = [step for step in STEPS if step < plan.leaves] + [plan.leaves]
        kind = f"{plan.leaves} leaves, {_over(plan.reduced)}, {plan.block} per code"
        yield Built(f"{kind}, SOAR {plan.soar:g}", effort, REORDERED, search)


def _trees(vectors: np.ndarray) -> Iterator[Any]:
    """The plan that tuning tries first, and some changes of it."""
    first = tuning.first_tree(vectors)
    change = functools.partial(dataclasses.replace, first)
    half = round(first.leaves / 2)
    plans = (
        first, change(leaves=half), change(leaves=half, reduced=first.reduced // 2),
        change(soar=1.5), change(block=2), change(block=2, soar=1.5), change(block=2, reduced=0),
    )  # fmt: skip
    yield from dict.fromkeys(plans)


def _over(reduced: int) -> str:
    return f"PCA {reduced}" if reduced else "all dimensions"


def faiss_ivfpq(vectors: np.ndarray) -> Iterator[Built]:
    """IVFPQ with 4-bit fast scan, refined by exact inner products.

    Over the same PCA as ScaNN with one and two dimensions per code, and over all dimensions with
    two.
    """
    import faiss

    rows, dimension = vectors.shape
    enough = tuning.enough_dimensions(vectors)
    forms = ((enough, 1), (enough, 2), (0, 2)) if enough else ((0, 2),)
    for root in LEAVES:
        for reduced, block in forms:
            cells = round(root * rows**0.5)
            factory = f"IVF{cells},PQ{(reduced or dimension) // block}x4fs"
            inner = faiss.index_factory(reduced or dimension, factory, faiss.METRIC_INNER_PRODUCT)
            index = _built(vectors, inner, reduced)
            effort = [step for step in STEPS if step < cells] + [cells]
            search = _faiss_search(index, inner, "nprobe")
            yield Built(f"{_over(reduced)}, {factory}, refined", effort, REORDERED, search)


def faiss_hnsw(vectors: np.ndarray) -> Iterator[Built]:
    """HNSW (Malkov and Yashunin 2016) of faiss, over the same PCA refined by exact inner products,
    and over all dimensions."""
    import faiss

    dimension = vectors.shape[1]
    reduced = tuning.enough_dimensions(vectors)
    effort = [step for step in STEPS if step >= 12]
    few, many = LINKS
    for kept, links in dict.fromkeys(((reduced, few), (0, few), (reduced // 2, few), (0, many))):
        graph = faiss.IndexHNSWFlat(kept or dimension, links, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        index = _built(vectors, graph, kept, refined=kept > 0)
        search = _faiss_search(index, graph.hnsw, "efSearch")
        yield Built(f"{_over(kept)}, M {links}", effort, REORDERED if kept else (0,), search)


def _built(vectors: np.ndarray, inner: Any, reduced: int, refined: bool = True) -> Any:
    """Builds a faiss index, with a PCA to `reduced` dimensions (0: none) and exact refinement."""
    import faiss

    index = inner
    if reduced:
        # Uncentred, as in ScaNN: subtracting the mean would change inner products.
        some = vectors[:: -(-len(vectors) // tuning.SPECTRUM_ROWS)]
        axes = np.linalg.eigh(some.T @ some)[1][:, ::-1][:, :reduced]
        projection = faiss.LinearTransform(vectors.shape[1], reduced, False)
        faiss.copy_array_to_vector(np.ascontiguousarray(axes.T).ravel(), projection.A)
        projection.is_trained = True
        index = faiss.IndexPreTransform(projection, inner)
    if refined:
        index = faiss.IndexRefineFlat(index)
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    index.train(vectors)
    index.add(vectors)
    faiss.omp_set_num_threads(1)
    return index


def _faiss_search(index: Any, inner: Any, attribute: str) -> Callable[[int, int], Search]:
    def with_settings(effort: int, reorder: int) -> Search:
        def search(queries: np.ndarray, k: int) -> np.ndarray:
            setattr(inner, attribute, effort)
            if reorder:
                index.k_factor = reorder / k
            return index.search(queries, k)[1]

        return search

    return with_settings


def hnswlib(vectors: np.ndarray) -> Iterator[Built]:
    """HNSW of the library of its authors."""
    import hnswlib as library

    for links in LINKS:
        index = library.Index(space="ip", dim=vectors.shape[1])
        index.init_index(max_elements=len(vectors), ef_construction=EF_CONSTRUCTION, M=links)
        index.set_num_threads(os.cpu_count() or 1)
        index.add_items(vectors)
        index.set_num_threads(1)

        def with_settings(length: int, reorder: int, index: Any = index) -> Search:
            def search(queries: np.ndarray, k: int) -> np.ndarray:
                index.set_ef(length)
                return index.knn_query(queries, k)[0]

            return search

        effort = [step for step in STEPS if step >= 12]
        yield Built(f"M {links}", effort, (0,), with_settings)


ENGINES: dict[str, Callable[[np.ndarray], Iterator[Built]]] = {
    "afa scann://": ours,
    "faiss IVFPQ": faiss_ivfpq,
    "faiss HNSW": faiss_hnsw,
    "hnswlib": hnswlib,
}
LIBRARIES = {  # engine -> required library
    "afa scann://": "scann", "faiss IVFPQ": "faiss", "faiss HNSW": "faiss", "hnswlib": "hnswlib",
}  # fmt: skip


def unchanged(vectors: np.ndarray) -> Any:
    """Stands for the function that rebuilds an index; indexes of a benchmark never change."""
    raise AssertionError("nothing is added or removed here")
