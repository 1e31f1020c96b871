"""What a ranking does not tell of descriptors: figures of pairs, of clusters, and the CMC curve."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from afa.data.types import ImageSet
from afa.evaluation.metrics import clusters, pairs
from afa.evaluation.metrics.retrieval import PADDING, Ranked, cumulative_match
from afa.evaluation.metrics.ties import Tied
from afa.evaluation.protocols import Protocol
from afa.retrieval.exact import topk

PICTURES = 5000  # as many as are counted in pairs and clustered within seconds
DEPTH = 20  # of the CMC curve
FALSE_MATCHES = (0.1, 0.01, 0.001)


def figures(
    queries: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "n d"],
    ranks: Int[np.ndarray, "q r"],
    images: ImageSet,
    protocol: Protocol,
    seed: int = 0,
) -> dict[str, Any]:
    """Further figures of a protocol's clean queries.

    Args:
      queries: unit vectors of the protocol's queries.
      gallery: unit vectors of its gallery.
      ranks: of every positive (`afa.retrieval.exact.positive_ranks`).
      seed: of k-means.

    Returns:
      "cmc": share of queries with a positive in the first 1, 2, ... results;
      "recall_at_1_over_ties": Recall@1 averaged over every order of equal scores;
      "pairs": AUROC, "fnmr_at_fmr" by false match rate (those that can be told from so many pairs),
      and the number of pairs of one and of two objects;
      "clusters": NMI and AMI of k-means with as many clusters as classes.
      Pairs and clusters are of whole classes whose queries have a positive, drawn until they have
      `IMAGES` images; with fewer than two such classes they are left out.
    """
    asked, offered = images.labels[protocol.queries], images.labels[protocol.gallery]
    ranked = Ranked(ranks, (ranks != PADDING).sum(axis=1))
    found: dict[str, Any] = {
        "cmc": cumulative_match(ranked, min(DEPTH, len(gallery))).tolist(),
        "recall_at_1_over_ties": _over_ties(
            queries, gallery, asked, offered, protocol.exclude, ranked.scored
        ),
    }
    both = asked if protocol.name == "leave_one_out" else np.concatenate([asked, offered])
    drawn = whole_classes(both[np.isin(both, asked[ranked.scored])], PICTURES, seed=0)
    if len(drawn) < 2:  # nothing to tell apart
        return found
    mine, theirs = np.isin(asked, drawn), np.isin(offered, drawn)
    if protocol.name == "leave_one_out":
        vectors, labels = queries[mine], asked[mine]
        counts = pairs.count_pairs(vectors, labels)
    else:
        vectors = np.concatenate([queries[mine], gallery[theirs]])
        labels = np.concatenate([asked[mine], offered[theirs]])
        counts = pairs.count_pairs_between(
            queries[mine], gallery[theirs], asked[mine], offered[theirs]
        )
    return found | {"pairs": _pairs(counts), "clusters": _clusters(vectors, labels, seed)}


def told(found: Mapping[str, Any]) -> str:
    """The figures in one line; "" when there are only those that the table has too."""
    if "pairs" not in found:
        return ""
    curve, pairs_, clusters_ = found["cmc"], found["pairs"], found["clusters"]
    parts = [f"AUROC of pairs {100 * pairs_['auroc']:.1f} %"]
    parts += [
        f"FNMR {100 * value:.1f} % at FMR {100 * float(rate):g} %"
        for rate, value in pairs_["fnmr_at_fmr"].items()
    ]
    parts.append(f"NMI {100 * clusters_['nmi']:.1f} %, AMI {100 * clusters_['ami']:.1f} %")
    return "; ".join([*parts, f"CMC at {len(curve)} {100 * curve[-1]:.1f} %"])


def whole_classes(labels: Int[np.ndarray, "n"], images: int, seed: int) -> Int64[np.ndarray, "c"]:
    """Classes drawn until the next one would make more than `images`; at least two."""
    names, sizes = np.unique(labels, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    count = int(np.searchsorted(np.cumsum(sizes[order]), images, side="right"))
    return np.sort(names[order[: max(count, 2)]])


def _over_ties(
    queries: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "n d"],
    asked: Int[np.ndarray, "q"],
    offered: Int[np.ndarray, "n"],
    exclude: Int[np.ndarray, "q"],
    scored: Bool[np.ndarray, "q"],
) -> float:
    """Only the results that share the best score are looked at, of the queries with a positive."""
    available = len(gallery) - bool(np.any(exclude != PADDING))
    values, left, count = np.zeros(len(queries)), np.arange(len(queries)), min(2, available)
    while len(left):
        scores, found = topk(queries[left], gallery, count, exclude[left])
        right = offered[found] == asked[left, None]
        values[left] = np.nan_to_num(Tied.from_scores(scores, right).recall_at_k(1))
        left = left[(scores[:, -1] == scores[:, 0]) & (count < available)]
        count = min(2 * count, available)
    return float(values[scored].mean())


def _pairs(counts: pairs.PairCounts) -> dict[str, Any]:
    different = int(counts.different.sum())
    told = [rate for rate in FALSE_MATCHES if rate * different >= 1]
    return {
        "auroc": pairs.auroc(counts),
        "fnmr_at_fmr": {f"{rate:g}": pairs.fnmr_at_fmr(counts, rate)[0] for rate in told},
        "same": int(counts.same.sum()),
        "different": different,
    }


def _clusters(
    vectors: Float32[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], seed: int
) -> dict[str, Any]:
    count = len(np.unique(labels))
    grouped = clusters.kmeans(vectors, count, seed)
    return {
        "nmi": clusters.normalised_mutual_information(grouped, labels),
        "ami": clusters.adjusted_mutual_information(grouped, labels),
        "clusters": count,
        "images": len(labels),
    }
