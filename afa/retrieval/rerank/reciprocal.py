"""k-reciprocal re-ranking: images are similar if they share mutual neighbours.

Zhong et al. 2017 ("Re-ranking Person Re-identification with k-reciprocal Encoding"). Unlike in the
paper, every query is ranked independently: queries are not neighbours of each other.
"""

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy import sparse

from afa.retrieval.rerank.contract import Scorer, neighbours, own_neighbours

OVERLAP = 2 / 3  # of a neighbour's own set that must be in the set it joins (equation 3)


def k_reciprocal(gallery: Float32[np.ndarray, "n d"], *, k1: int, k2: int, plain: float) -> Scorer:
    """Ranks by a weighted mean of neighbourhood Jaccard similarity and cosine similarity.

    Args:
      gallery: unit vectors.
      k1: number of neighbours from which mutual neighbours are selected.
      k2: number of neighbours whose codes are averaged, including the row itself (1: no averaging).
      plain: weight of the cosine similarity; lambda in the paper.
    """
    similarity, rows = own_neighbours(gallery, k1)
    sets = _Sets(similarity, rows)
    codes = _averaged(_codes(gallery, sets), rows[:, : k2 - 1])
    by_row = codes.tocsc()

    def score(
        queries: Float32[np.ndarray, "q d"], exclude: Int64[np.ndarray, "q"]
    ) -> Float32[np.ndarray, "q n"]:
        near, found = neighbours(queries, gallery, k1, exclude)
        scores = np.empty((len(queries), len(gallery)), np.float32)
        for i, query in enumerate(queries):
            members = sets.joined(found[i][near[i] >= sets.last[found[i]]])
            code = np.zeros(len(gallery))
            code[members] = _weights(gallery[members] @ query)
            for neighbour in found[i][: k2 - 1]:
                code += codes[[neighbour]].toarray()[0]
            code /= max(code.sum(), 1e-12)
            scores[i] = (1 - plain) * _jaccard(code, by_row) + plain * (gallery @ query)
        return scores

    return score


class _Sets:
    """Mutual neighbours of every gallery row.

    Attributes:
      last: similarity of each row's k1-th neighbour.
      all: mutual neighbours among the k1 nearest.
      halves: mutual neighbours among the k1/2 nearest.
    """

    def __init__(
        self, similarity: Float32[np.ndarray, "n k"], rows: Int64[np.ndarray, "n k"]
    ) -> None:
        half = -(-rows.shape[1] // 2)
        self.last = similarity[:, -1]
        self.all = _mutual(rows)
        self.halves = _mutual(rows[:, :half])

    def joined(self, members: Int64[np.ndarray, "m"]) -> Int64[np.ndarray, "j"]:
        """Returns the members, with the half-size sets that overlap them by two thirds (eq. 3)."""
        own = set(members.tolist())
        extra = set()
        for member in members:
            half = self.halves[member] | {int(member)}
            if len(own & half) >= OVERLAP * len(half):
                extra |= half
        return np.array(sorted(own | extra), np.int64)


def _mutual(rows: Int64[np.ndarray, "n k"]) -> list[set[int]]:
    near = [set(line.tolist()) for line in rows]
    return [{j for j in line if i in near[j]} for i, line in enumerate(near)]


def _weights(similarity: Float32[np.ndarray, "m"]) -> Float64[np.ndarray, "m"]:
    """exp(-distance), with the squared distance of unit vectors (equation 7)."""
    return np.exp(-(2 - 2 * similarity.astype(np.float64)))


def _codes(gallery: Float32[np.ndarray, "n d"], sets: _Sets) -> sparse.csr_array:
    columns, values, begins = [], [], [0]
    for row, own in enumerate(sets.all):
        members = sets.joined(np.array(sorted(own | {row}), np.int64))
        columns.append(members)
        values.append(_weights(gallery[members] @ gallery[row]))
        begins.append(begins[-1] + len(members))
    count = len(gallery)
    return sparse.csr_array(
        (np.concatenate(values), np.concatenate(columns), begins), (count, count)
    )


def _averaged(codes: sparse.csr_array, near: Int64[np.ndarray, "n k"]) -> sparse.csr_array:
    """Adds the codes of the nearest rows and normalises the sum to 1 (local query expansion)."""
    count = len(near)
    begins = np.arange(0, near.size + 1, near.shape[1]) if near.size else np.zeros(count + 1, int)
    pick = sparse.csr_array((np.ones(near.size), near.ravel(), begins), (count, count))
    total = sparse.csr_array(codes + pick @ codes)
    scale = sparse.diags_array(1 / np.maximum(np.asarray(total.sum(axis=1)).ravel(), 1e-12))
    return sparse.csr_array(scale @ total)


def _jaccard(code: Float64[np.ndarray, "n"], by_row: sparse.csc_array) -> Float64[np.ndarray, "n"]:
    """Sum of minima over sum of maxima; both codes sum to 1, so it is s / (2 - s)."""
    members = np.flatnonzero(code)
    shared = np.zeros(len(code))
    for member in members:
        begin, end = by_row.indptr[member], by_row.indptr[member + 1]
        rows = by_row.indices[begin:end]
        shared[rows] += np.minimum(by_row.data[begin:end], code[member])
    return shared / (2 - shared)
