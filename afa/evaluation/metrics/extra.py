"""Extra metrics of descriptors: verification of pairs, clustering, and the CMC curve."""

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

MAX_IMAGES = 5000  # pairs and clusters of this many images take seconds
DEPTH = 20  # ranks of the CMC curve
FALSE_MATCHES = (0.1, 0.01, 0.001)  # false match rates at which the FNMR is reported


def figures(
    queries: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "n d"],
    ranks: Int[np.ndarray, "q r"],
    images: ImageSet,
    protocol: Protocol,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes the extra metrics of a protocol's clean queries.

    Args:
      queries: unit vectors of the protocol's queries.
      gallery: unit vectors of its gallery.
      ranks: ranks of all positives (`afa.retrieval.exact.positive_ranks`).
      images: the image set that the protocol indexes.
      seed: seed of k-means.

    Returns:
      "cmc": share of queries with a positive in the first 1, 2, ... results;
      "recall_at_1_over_ties": Recall@1 averaged over every order of equal scores;
      "pairs": "auroc", "fnmr_at_fmr" by false match rate (only rates that this many pairs can
      measure), and "same" and "different", the numbers of pairs of one and of two classes;
      "clusters": "nmi" and "ami" of k-means with as many clusters as classes.
      Pairs and clusters use all images of some classes whose queries have a positive, at most
      `MAX_IMAGES` images. With fewer than two such classes both are left out.
    """
    query_labels, gallery_labels = images.labels[protocol.queries], images.labels[protocol.gallery]
    ranked = Ranked(ranks, (ranks != PADDING).sum(axis=1))
    found: dict[str, Any] = {
        "cmc": cumulative_match(ranked, min(DEPTH, len(gallery))).tolist(),
        "recall_at_1_over_ties": _over_ties(
            queries, gallery, query_labels, gallery_labels, protocol.exclude, ranked.scored
        ),
    }
    leave_one_out = np.array_equal(protocol.queries, protocol.gallery)
    both = query_labels if leave_one_out else np.concatenate([query_labels, gallery_labels])
    drawn = draw_classes(both[np.isin(both, query_labels[ranked.scored])], MAX_IMAGES, seed=0)
    if len(drawn) < 2:
        return found
    of_queries, of_gallery = np.isin(query_labels, drawn), np.isin(gallery_labels, drawn)
    if leave_one_out:
        vectors, labels = queries[of_queries], query_labels[of_queries]
        counts = pairs.count_pairs(vectors, labels)
    else:
        parts = queries[of_queries], gallery[of_gallery]
        part_labels = query_labels[of_queries], gallery_labels[of_gallery]
        vectors, labels = np.concatenate(parts), np.concatenate(part_labels)
        counts = pairs.count_pairs_between(*parts, *part_labels)
    return found | {"pairs": _pairs(counts), "clusters": _clusters(vectors, labels, seed)}


def summary(found: Mapping[str, Any]) -> str:
    """Formats the extra metrics as one line; "" if pairs and clusters were left out."""
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


def draw_classes(labels: Int[np.ndarray, "n"], images: int, seed: int) -> Int64[np.ndarray, "c"]:
    """Draws classes with at most `images` images in total, but at least two classes.

    Args:
      labels: class of each image.
      images: most images in total.
      seed: seed of the draw.

    Returns:
      The drawn classes, ascending.
    """
    names, sizes = np.unique(labels, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    count = int(np.searchsorted(np.cumsum(sizes[order]), images, side="right"))
    return np.sort(names[order[: max(count, 2)]])


def _over_ties(
    queries: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "n d"],
    query_labels: Int[np.ndarray, "q"],
    gallery_labels: Int[np.ndarray, "n"],
    exclude: Int[np.ndarray, "q"],
    scored: Bool[np.ndarray, "q"],
) -> float:
    """Recall@1 averaged over the orders of equal scores.

    Only as many results are retrieved as share the best score.
    """
    available = len(gallery) - bool(np.any(exclude != PADDING))
    values, left, count = np.zeros(len(queries)), np.arange(len(queries)), min(2, available)
    while len(left):
        scores, found = topk(queries[left], gallery, count, exclude[left])
        right = gallery_labels[found] == query_labels[left, None]
        values[left] = np.nan_to_num(Tied.from_scores(scores, right).recall_at_k(1))
        left = left[(scores[:, -1] == scores[:, 0]) & (count < available)]
        count = min(2 * count, available)
    return float(values[scored].mean())


def _pairs(counts: pairs.PairCounts) -> dict[str, Any]:
    different = int(counts.different.sum())
    rates = [rate for rate in FALSE_MATCHES if rate * different >= 1]
    return {
        "auroc": pairs.auroc(counts),
        "fnmr_at_fmr": {f"{rate:g}": pairs.fnmr_at_fmr(counts, rate)[0] for rate in rates},
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
