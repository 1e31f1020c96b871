"""Retrieval metrics in plain NumPy.

All metrics are computed from `Ranked`: the ranks of the positives of each query, from 0, after the
query itself and junk are removed. A metric returns one value per query. A query without positives
has no value (NaN) and is left out of every mean (`Metrics.left_out`).

Notation in the formulas: R is the number of positives of a query, retrieved or not; r_0 < r_1 < ...
are the ranks of the retrieved positives; P_i is the precision of the first i results.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped

from afa.errors import UserError

PADDING = -1
RECALL_CUTS = (1, 2, 4, 8)
BLOCK = 2**24  # similarities in memory at a time


@dataclass(frozen=True)
class Ranked:
    """Ranks of the positives of each query.

    Attributes:
      ranks: (q, r) ranks of the retrieved positives, ascending, 0-based, padded with -1 at the end.
      relevant: (q,) R, the number of positives in the gallery, retrieved or not.
      depth: (q,) length of each result list; None if lists hold the whole gallery.

    Raises:
      UserError: ranks that are not ascending, fewer positives than ranks, or a rank beyond the end
        of its list.
    """

    ranks: Int[np.ndarray, "q r"]
    relevant: Int[np.ndarray, "q"]
    depth: Int[np.ndarray, "q"] | None = None

    def __post_init__(self) -> None:
        before, after = self.ranks[:, :-1], self.ranks[:, 1:]
        if np.any((after != PADDING) & ((before == PADDING) | (after <= before))):
            raise UserError("the ranks of a query must ascend, with -1 only after the last one")
        if np.any(self.ranks < PADDING):
            raise UserError(f"a rank is {self.ranks.min()}; ranks start at 0 and -1 is padding")
        if np.any(self.relevant < self.found.sum(axis=1)):
            raise UserError("a query has more positives in its list than in the gallery")
        if self.depth is not None and np.any(self.ranks >= self.depth[:, None]):
            raise UserError("the rank of a positive is beyond the end of its list")

    @property
    def found(self) -> Bool[np.ndarray, "q r"]:
        """Entries of `ranks` that are not padding."""
        return self.ranks != PADDING

    @property
    def scored(self) -> Bool[np.ndarray, "q"]:
        """Queries that have at least one positive."""
        return self.relevant > 0

    @classmethod
    def from_lists(
        cls,
        neighbours: Sequence[Shaped[np.ndarray, "_"]],
        positives: Sequence[Collection[Hashable]],
        junk: Sequence[Collection[Hashable]] | None = None,
        complete: bool = False,
    ) -> "Ranked":
        """Builds ranks from lists of results, best first.

        A result that appears twice counts once, at its first rank; its second rank counts as wrong.

        Args:
          neighbours: results of each query (gallery rows or ids).
          positives: all positives of each query.
          junk: results of each query that are removed from its list before ranks are counted,
            such as the query itself.
          complete: whether the lists hold the whole gallery.
        """
        ignored = [()] * len(neighbours) if junk is None else junk
        rows, depth = [], []
        for results, right, skipped in zip(neighbours, positives, map(set, ignored), strict=True):
            kept = [result for result in results.tolist() if result not in skipped]
            first: dict[Hashable, int] = {}
            for rank, result in enumerate(kept):
                first.setdefault(result, rank)
            rows.append(sorted(first[result] for result in set(right) if result in first))
            depth.append(len(kept))
        relevant = np.array([len(set(right)) for right in positives], np.int64)
        return cls(pad(rows), relevant, None if complete else np.array(depth, np.int64))

    @classmethod
    def joined(cls, parts: "Sequence[Ranked]") -> "Ranked":
        """Concatenates complete rankings of several blocks of queries.

        Raises:
          UserError: a part does not rank the whole gallery.
        """
        if any(part.depth is not None for part in parts):
            raise UserError("only rankings of the whole gallery can be joined")
        rows = [line[line != PADDING] for part in parts for line in part.ranks]
        return cls(pad(rows), np.concatenate([part.relevant for part in parts]))

    @classmethod
    def from_vectors(
        cls,
        queries: Float32[np.ndarray, "q d"],
        gallery: Float32[np.ndarray, "n d"],
        positives: Sequence[Int[np.ndarray, "_"]],
        junk: Sequence[Int[np.ndarray, "_"]] | None = None,
        block: int = BLOCK,
    ) -> "Ranked":
        """Ranks the whole gallery by cosine similarity.

        Args:
          queries, gallery: unit vectors.
          positives: gallery rows of the positives of each query.
          junk: gallery rows of each query that are removed from the ranking.
          block: most similarities in memory at a time, but at least those of one query.

        Raises:
          UserError: as `from_scores`.
        """
        ignored = [np.zeros(0, np.int64)] * len(queries) if junk is None else junk
        parts = []
        step = max(1, block // len(gallery))
        for begin in range(0, len(queries), step):
            rows = slice(begin, begin + step)
            scores = queries[rows] @ gallery.T
            masks = (_masks(part[rows], len(gallery)) for part in (positives, ignored))
            parts.append(cls.from_scores(scores, *masks))
        return cls.joined(parts)

    @classmethod
    def from_scores(
        cls,
        scores: Float[np.ndarray, "q n"],
        positives: Bool[np.ndarray, "q n"],
        junk: Bool[np.ndarray, "q n"] | None = None,
    ) -> "Ranked":
        """Ranks the whole gallery by score; ties are broken by the lower gallery index.

        Args:
          scores: similarity of every query to every gallery row.
          positives: whether the row is a positive of the query.
          junk: whether the row is removed from the ranking of the query.

        Raises:
          UserError: a score is NaN or infinite. Sorting puts them at arbitrary ranks, so NaN
            embeddings could reach a Recall@1 of 100 %.
        """
        check_finite("scores", scores)
        skipped = np.zeros_like(positives) if junk is None else junk
        order = np.argsort(-scores, axis=1, kind="stable")
        rows = [
            np.flatnonzero(positives[query, line[~skipped[query, line]]])
            for query, line in enumerate(order)
        ]
        return cls(pad(rows), (positives & ~skipped).sum(axis=1))


def _masks(indices: Sequence[Int[np.ndarray, "_"]], count: int) -> Bool[np.ndarray, "q n"]:
    masks = np.zeros((len(indices), count), bool)
    for mask, index in zip(masks, indices, strict=True):
        mask[index] = True
    return masks


def pad(rows: Sequence[Sequence[int] | Int[np.ndarray, "_"]]) -> Int64[np.ndarray, "q r"]:
    """Stacks rows of different lengths, padded with -1."""
    table = np.full((len(rows), max(map(len, rows), default=0)), PADDING, np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def check_finite(name: str, values: Float[np.ndarray, "q ..."]) -> None:
    """Checks that all values are finite.

    Raises:
      UserError: names the array, the number of rows with NaN or infinity, and the first of them.
    """
    bad = np.asarray(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if bad.any():
        share = f"{bad.sum()} of {len(bad)} rows hold NaN or infinity"
        raise UserError(f"{name}: {share} (first: row {bad.argmax()})")


# ---- metrics with one value per query ----------------------------------------------------------


def recall_at_k(ranked: Ranked, k: int) -> Float64[np.ndarray, "q"]:
    """1 if any positive is among the first k results, else 0: the Recall@K of metric learning.

    Raises:
      UserError: a list holds fewer than k results.
    """
    _need(ranked, f"Recall@{k}", k)
    return _blank(ranked, np.any(_first(ranked, k), axis=1))


def precision_at_k(ranked: Ranked, k: int) -> Float64[np.ndarray, "q"]:
    """P_k, the share of positives among the first k results.

    Raises:
      UserError: a list holds fewer than k results.
    """
    _need(ranked, f"precision@{k}", k)
    return _blank(ranked, _first(ranked, k).sum(axis=1) / k)


def coverage_at_k(ranked: Ranked, k: int) -> Float64[np.ndarray, "q"]:
    """Share of a query's positives among the first k: the recall of information retrieval.

    Raises:
      UserError: a list holds fewer than k results.
    """
    _need(ranked, f"coverage@{k}", k)
    return _divide(ranked, _first(ranked, k).sum(axis=1), ranked.relevant)


def r_precision(ranked: Ranked) -> Float64[np.ndarray, "q"]:
    """P_R, the precision of the first R results (Musgrave et al. 2020, section 3.2).

    Raises:
      UserError: a list is shorter than the R of its query.
    """
    _need(ranked, "R-precision", ranked.relevant)
    return _divide(ranked, _first(ranked, ranked.relevant).sum(axis=1), ranked.relevant)


def map_at_r(ranked: Ranked) -> Float64[np.ndarray, "q"]:
    """1/R · sum of the precision at each positive in the first R results (Musgrave et al. 2020).

    Raises:
      UserError: a list is shorter than the R of its query.
    """
    _need(ranked, "MAP@R", ranked.relevant)
    gained = np.where(_first(ranked, ranked.relevant), _precision_at_found(ranked), 0.0)
    return _divide(ranked, gained.sum(axis=1), ranked.relevant)


def map_at_k(ranked: Ranked, k: int) -> Float64[np.ndarray, "q"]:
    """1/min(R, k) · sum of the precision at each positive in the first k (Google Landmarks)."""
    gained = np.where(_first(ranked, k), _precision_at_found(ranked), 0.0)
    return _divide(ranked, gained.sum(axis=1), np.minimum(ranked.relevant, k))


def average_precision(ranked: Ranked) -> Float64[np.ndarray, "q"]:
    """1/R · sum_j (j+1)/(r_j+1) over the whole list; a positive that is not retrieved adds 0."""
    gained = np.where(ranked.found, _precision_at_found(ranked), 0.0)
    return _divide(ranked, gained.sum(axis=1), ranked.relevant)


def average_precision_trapezoid(ranked: Ranked) -> Float64[np.ndarray, "q"]:
    """Area under the precision-recall curve by the trapezoidal rule: the mAP of Oxford and Paris.

    1/R · sum_j (p_j + (j+1)/(r_j+1)) / 2, where p_j = j/r_j is the precision just before the
    positive, and p_0 = 1 if r_0 = 0 (Philbin et al. 2007; Radenović et al. 2018).
    """
    index = np.arange(ranked.ranks.shape[1])
    before = np.where(ranked.ranks > 0, index / np.maximum(ranked.ranks, 1), 1.0)
    gained = np.where(ranked.found, (before + _precision_at_found(ranked)) / 2, 0.0)
    return _divide(ranked, gained.sum(axis=1), ranked.relevant)


def cumulative_match(ranked: Ranked, depth: int) -> Float64[np.ndarray, "depth"]:
    """CMC curve: share of queries with a positive among the first 1, 2, ..., `depth` results.

    Over the queries that have a positive; a standard metric of re-identification.

    Raises:
      UserError: a list holds fewer than `depth` results, or no query has a positive.
    """
    _need(ranked, f"CMC to rank {depth}", depth)
    if not ranked.scored.any():
        raise UserError(f"none of the {len(ranked.relevant)} queries has a positive in the gallery")
    first = ranked.ranks[ranked.scored, 0] if ranked.ranks.shape[1] else np.zeros(0, np.int64)
    found = np.bincount(first[(first >= 0) & (first < depth)], minlength=depth)
    return np.cumsum(found) / ranked.scored.sum()


def precision_to_last(ranked: Ranked, k: int) -> Float64[np.ndarray, "q"]:
    """Precision at min(k, rank of the last positive): the mP@k of revisited Oxford and Paris.

    Ranks count from 1 here. 0 for a query whose list holds none of its positives.
    """
    last = ranked.ranks.max(axis=1, initial=PADDING) + 1
    cut = np.where(last > 0, np.minimum(last, k), k)
    return _blank(ranked, _first(ranked, cut).sum(axis=1) / cut)


def reciprocal_rank(ranked: Ranked) -> Float64[np.ndarray, "q"]:
    """1/(r_0+1); 0 if the list contains no positive."""
    if not ranked.ranks.shape[1]:
        return _blank(ranked, np.zeros(len(ranked.ranks)))
    first = ranked.ranks[:, 0]
    return _blank(ranked, np.where(first >= 0, 1.0 / np.maximum(first + 1, 1), 0.0))


# ---- metrics of a set of queries ---------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """Metrics of one set of queries.

    Attributes:
      per_query: name -> (q,) values, NaN for a query without positives.
      queries: number of queries.
      scored: number of queries that have a positive; means are over these.
    """

    per_query: dict[str, Float64[np.ndarray, "q"]]
    queries: int
    scored: int

    @property
    def means(self) -> dict[str, float]:
        """Name -> mean over the scored queries."""
        return {name: scored_mean(values) for name, values in self.per_query.items()}

    @property
    def left_out(self) -> int:
        """Number of queries without a positive in the gallery."""
        return self.queries - self.scored


def metrics_from_ranks(
    positive_ranks: Int[np.ndarray, "q r"], ks: Sequence[int] = RECALL_CUTS
) -> Metrics:
    """Computes Recall@K, MAP@R, R-precision and mean average precision of complete rankings.

    Args:
      positive_ranks: the ranks of ALL positives of each query, ascending, 0-based, padded with -1
        (`afa.retrieval.exact.positive_ranks`).
      ks: values of K.

    Raises:
      UserError: no query has a positive, or the ranks are malformed.
    """
    relevant = (positive_ranks != PADDING).sum(axis=1)
    return metrics_of(Ranked(positive_ranks, relevant), ks)


def metrics_of(ranked: Ranked, ks: Sequence[int] = RECALL_CUTS) -> Metrics:
    """Computes the metrics of `metrics_from_ranks` from rankings that may be truncated.

    Raises:
      UserError: no query has a positive, or a list is shorter than a metric needs.
    """
    if not ranked.scored.any():
        raise UserError(f"none of the {len(ranked.relevant)} queries has a positive in the gallery")
    figures: dict[str, Callable[[Ranked], Float64[np.ndarray, "q"]]] = {
        "map_at_r": map_at_r,
        "r_precision": r_precision,
        "mean_average_precision": average_precision,
    }
    per_query = {f"recall_at_{k}": recall_at_k(ranked, k) for k in ks}
    per_query |= {name: figure(ranked) for name, figure in figures.items()}
    return Metrics(per_query, len(ranked.relevant), int(ranked.scored.sum()))


def scored_mean(values: Float[np.ndarray, "q"]) -> float:
    """Mean over the queries that have a value; queries without positives are left out."""
    return float(values[~np.isnan(values)].mean())


def class_mean(values: Float[np.ndarray, "q"], labels: Int[np.ndarray, "q"]) -> float:
    """Mean over classes of the mean over the queries of a class (macro average).

    A class without a query that has a value is left out.
    """
    _, group = np.unique(labels[~np.isnan(values)], return_inverse=True)
    sums = np.bincount(group, weights=values[~np.isnan(values)])
    return float((sums / np.bincount(group)).mean())


# ---- helpers -----------------------------------------------------------------------------------


def _first(ranked: Ranked, k: int | Int[np.ndarray, "q"]) -> Bool[np.ndarray, "q r"]:
    """Whether each positive is among the first k results."""
    return ranked.found & (ranked.ranks < np.reshape(k, (-1, 1)))


def _precision_at_found(ranked: Ranked) -> Float64[np.ndarray, "q r"]:
    """Precision at each positive; arbitrary at the padding."""
    return np.arange(1, ranked.ranks.shape[1] + 1) / np.maximum(ranked.ranks + 1, 1)


def _divide(
    ranked: Ranked, total: Shaped[np.ndarray, "q"], by: Int[np.ndarray, "q"]
) -> Float64[np.ndarray, "q"]:
    return _blank(ranked, total / np.maximum(by, 1))


def _blank(ranked: Ranked, values: Shaped[np.ndarray, "q"]) -> Float64[np.ndarray, "q"]:
    """Sets the value of queries without positives to NaN."""
    return np.where(ranked.scored, values.astype(np.float64), np.nan)


def _need(ranked: Ranked, figure: str, length: int | Int[np.ndarray, "q"]) -> None:
    """Refuses truncated lists in which a metric would silently be too low."""
    if ranked.depth is None:
        return
    short = ranked.scored & (ranked.depth < length)
    if short.any():
        query = int(short.argmax())
        needed = int(np.broadcast_to(length, ranked.depth.shape)[query])
        raise UserError(
            f"{figure} needs the first {needed} results of query {query},"
            f" but its list holds {ranked.depth[query]}"
        )
