"""The search libraries that `experiments.search_benchmark` compares, behind one small interface."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

LEAVES = (2.0, 1.0, 4.0)  # in square roots of the number of rows
LINKS = (16, 32)  # of a node of a graph
EF_CONSTRUCTION = 200
REORDERED = (20, 40, 80, 160, 320)
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
    from afa.retrieval.index.scann import Plan, ScannEngine
    from afa.retrieval.records import Records

    rows = Records.of(vectors, np.arange(len(vectors)))
    for root, soar in ((2.0, 0.0), (1.0, 0.0), (2.0, 1.5), (4.0, 0.0), (1.0, 1.5)):
        leaves = round(root * len(vectors) ** 0.5)
        engine = ScannEngine.build(vectors, Plan("tree", leaves, 1, soar=soar), threads=1)

        def ask(searched: int, reorder: int, engine: ScannEngine = engine) -> Ask:
            asked = engine.with_plan(searched=searched, reorder=reorder)
            index = LocalIndex("scann://", unchanged, rows, {}, asked, len(vectors))
            return lambda queries, k: index.search(queries, k).ids

        effort = [step for step in STEPS if step < leaves] + [leaves]
        yield Built(f"{leaves} leaves, SOAR {soar:g}", effort, REORDERED, ask)


def faiss_ivfpq(vectors: np.ndarray) -> Iterator[Built]:
    """IVFPQ with 4-bit fast scan, as many dimensions a code as ScaNN, refined by exact products."""
    import faiss

    rows, dimension = vectors.shape
    for root in LEAVES:
        cells = round(root * rows**0.5)
        words = f"IVF{cells},PQ{dimension // 2}x4fs,RFlat"
        index = faiss.index_factory(dimension, words, faiss.METRIC_INNER_PRODUCT)
        faiss.omp_set_num_threads(os.cpu_count() or 1)
        index.train(vectors)
        index.add(vectors)
        faiss.omp_set_num_threads(1)
        inner = faiss.extract_index_ivf(index)

        def ask(probes: int, reorder: int, index: Any = index, inner: Any = inner) -> Ask:
            def search(queries: np.ndarray, k: int) -> np.ndarray:
                inner.nprobe, index.k_factor = probes, reorder / k
                return index.search(queries, k)[1]

            return search

        effort = [step for step in STEPS if step < cells] + [cells]
        yield Built(words, effort, REORDERED, ask)


def faiss_hnsw(vectors: np.ndarray) -> Iterator[Built]:
    """Navigable small worlds (Malkov and Yashunin 2016) of faiss."""
    import faiss

    for links in LINKS:
        index = faiss.IndexHNSWFlat(vectors.shape[1], links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = EF_CONSTRUCTION
        faiss.omp_set_num_threads(os.cpu_count() or 1)
        index.add(vectors)
        faiss.omp_set_num_threads(1)

        def ask(length: int, reorder: int, index: Any = index) -> Ask:
            def search(queries: np.ndarray, k: int) -> np.ndarray:
                index.hnsw.efSearch = length
                return index.search(queries, k)[1]

            return search

        yield Built(f"M {links}", [step for step in STEPS if step >= 12], (0,), ask)


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
