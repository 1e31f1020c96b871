"""Metrics of a complete ranking, by the names of the reference values."""

from afa.evaluation.metrics import retrieval as metrics

FIGURES = {
    "r_precision": metrics.r_precision,
    "map_at_r": metrics.map_at_r,
    "mean_average_precision": metrics.average_precision,
    "average_precision": metrics.average_precision,
    "average_precision_trapezoid": metrics.average_precision_trapezoid,
    "reciprocal_rank": metrics.reciprocal_rank,
}
