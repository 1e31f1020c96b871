"""Metrics in plain NumPy, checked against reference values.

A ranking is a `Ranked`; most metrics are functions of it and give one value a query.

>>> import numpy as np
>>> import afa
>>> vectors = np.float32([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]])
>>> labels = np.array([0, 0, 1, 1])
>>> scores = vectors @ vectors.T
>>> itself = np.eye(4, dtype=bool)
>>> same = (labels[:, None] == labels) & ~itself
>>> ranked = afa.metrics.Ranked.from_scores(scores, same, junk=itself)
>>> afa.metrics.recall_at_k(ranked, 1).tolist()
[1.0, 1.0, 1.0, 1.0]
>>> round(afa.metrics.auroc(afa.metrics.count_pairs(vectors, labels)), 2)
1.0
"""

from afa.evaluation.metrics.clusters import (
    adjusted_mutual_information,
    kmeans,
    normalised_mutual_information,
)
from afa.evaluation.metrics.landmarks import global_average_precision, landmark_precision
from afa.evaluation.metrics.pairs import (
    PairCounts,
    auroc,
    count_pairs,
    count_pairs_between,
    counted,
    fnmr_at_fmr,
)
from afa.evaluation.metrics.retrieval import (
    Metrics,
    Ranked,
    average_precision,
    average_precision_trapezoid,
    class_mean,
    coverage_at_k,
    cumulative_match,
    map_at_k,
    map_at_r,
    metrics_from_ranks,
    metrics_of,
    precision_at_k,
    precision_to_last,
    r_precision,
    recall_at_k,
    reciprocal_rank,
    scored_mean,
)

__all__ = [
    "Metrics", "PairCounts", "Ranked", "adjusted_mutual_information", "auroc", "average_precision",
    "average_precision_trapezoid", "class_mean", "count_pairs", "count_pairs_between", "counted",
    "coverage_at_k", "cumulative_match", "fnmr_at_fmr", "global_average_precision", "kmeans",
    "landmark_precision", "map_at_k", "map_at_r", "metrics_from_ranks", "metrics_of",
    "normalised_mutual_information", "precision_at_k", "precision_to_last", "r_precision",
    "recall_at_k", "reciprocal_rank", "scored_mean",
]  # fmt: skip
