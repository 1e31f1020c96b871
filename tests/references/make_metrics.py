"""Makes `tests/data/metrics/agreement_*.json`: what other evaluators find on random data.

Needs an environment of its own, with PyTorch (CPU), pytorch-metric-learning 2.9.0 and scikit-learn:

    python -m tests.references.make_metrics

pytorch-metric-learning gives precision@1, R-precision, MAP@R, mAP and the reciprocal rank, once as
means over queries and once over classes; scikit-learn neighbours (for Recall@K), the average
precision of every query, its area by trapezoids, AUROC, FNMR at FMR, NMI and AMI.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn import metrics
from sklearn.neighbors import NearestNeighbors

HERE = Path(__file__).parent.parent / "data" / "metrics"
CUTS = (1, 2, 4, 8)
RATES = (0.2, 0.05, 0.01)
NAMES = {
    "precision_at_1": "recall_at_1",
    "r_precision": "r_precision",
    "mean_average_precision_at_r": "map_at_r",
    "mean_average_precision": "mean_average_precision",
    "mean_reciprocal_rank": "reciprocal_rank",
}


def vectors(draw: np.random.Generator, labels: np.ndarray, spread: float) -> np.ndarray:
    centres = np.random.default_rng(5).normal(size=(64, 8))
    rows = centres[labels] + spread * draw.normal(size=(len(labels), 8))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return np.round(rows, 4)  # what JSON keeps


def by_pml(given: dict[str, np.ndarray], itself: bool, by_class: bool) -> dict[str, float]:
    """Every gallery row is asked for: with fewer, some of its figures are silently too low."""
    calculator = AccuracyCalculator(
        include=tuple(NAMES), k=len(given["gallery"]) - itself, avg_of_avgs=by_class,
        device=torch.device("cpu"), knn_func=CustomKNN(CosineSimilarity(), batch_size=16),
    )  # fmt: skip
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    found = calculator.get_accuracy(
        tensors["query"], tensors["query_labels"], tensors["gallery"], tensors["gallery_labels"],
        ref_includes_query=itself,
    )  # fmt: skip
    return {NAMES[name]: float(value) for name, value in found.items()}


def by_sklearn(given: dict[str, np.ndarray], exclude: np.ndarray) -> dict[str, list[Any]]:
    """Figures of every query; None where it has no positive."""
    gallery = given["gallery"]
    search = NearestNeighbors(n_neighbors=len(gallery), metric="cosine", algorithm="brute")
    order = search.fit(gallery.astype(np.float64)).kneighbors(
        given["query"].astype(np.float64), return_distance=False
    )
    names = [f"recall_at_{k}" for k in CUTS]
    found: dict[str, list[Any]] = {
        name: [] for name in (*names, "average_precision", "average_precision_trapezoid")
    }
    for query, row in enumerate(order):
        row = row[row != exclude[query]]
        right = given["gallery_labels"][row] == given["query_labels"][query]
        if not right.any():
            for values in found.values():
                values.append(None)
            continue
        for k in CUTS:
            found[f"recall_at_{k}"].append(float(right[:k].any()))
        falling = -np.arange(len(row), dtype=float)
        found["average_precision"].append(float(metrics.average_precision_score(right, falling)))
        rank = np.arange(1, len(row) + 1)
        recall, precision = np.cumsum(right) / right.sum(), np.cumsum(right) / rank
        area = metrics.auc(np.concatenate([[0], recall]), np.concatenate([[1], precision]))
        found["average_precision_trapezoid"].append(float(area))
    return found


def verification(given: dict[str, np.ndarray]) -> dict[str, Any]:
    """AUROC and FNMR at FMR of all pairs of gallery images."""
    rows, labels = given["gallery"], given["gallery_labels"]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)  # as rounded, they are not quite unit
    i, j = np.triu_indices(len(rows), 1)
    scores = np.einsum("pd,pd->p", rows[i].astype(np.float64), rows[j].astype(np.float64))
    same = labels[i] == labels[j]
    false, true, _ = metrics.roc_curve(same, scores, drop_intermediate=False)
    return {
        "auroc": float(metrics.roc_auc_score(same, scores)),
        "fnmr_at_fmr": {str(rate): float(1 - true[false <= rate].max()) for rate in RATES},
    }


def clusters(draw: np.random.Generator, labels: np.ndarray) -> dict[str, Any]:
    found = np.where(draw.random(len(labels)) < 0.5, labels % 5, draw.integers(0, 6, len(labels)))
    return {
        "found": found.tolist(),
        "nmi": float(metrics.normalized_mutual_info_score(labels, found)),
        "ami": float(metrics.adjusted_mutual_info_score(labels, found)),
    }


def case(name: str, seed: int, spread: float, queries: int, gallery: int, itself: bool) -> None:
    """One file.

    Args:
      itself: the queries are the first rows of the gallery, and not to be found.
    """
    draw = np.random.default_rng(seed)
    # Few large classes and many small ones; some queries have nothing to find.
    labels = np.minimum(draw.geometric(0.12, gallery), 20)
    rows = vectors(draw, labels, spread)
    asked = labels[:queries] if itself else np.minimum(draw.geometric(0.12, queries), 30)
    given = {
        "query": rows[:queries] if itself else vectors(draw, asked, spread),
        "gallery": rows, "query_labels": asked, "gallery_labels": labels,
    }  # fmt: skip
    exclude = np.arange(queries) if itself else np.full(queries, -1)
    content = {
        "note": "pytorch-metric-learning 2.9.0 and scikit-learn on random data",
        **{name: np.asarray(value).tolist() for name, value in given.items()},
        "exclude": exclude.tolist(),
        "figures": by_pml(given, itself, False),
        "class_means": by_pml(given, itself, True),
        "per_query": by_sklearn(given, exclude),
        "pairs": verification(given),
        "clusters": clusters(draw, labels),
    }
    for key in ("query", "gallery"):
        content[key] = [[round(x, 4) for x in row] for row in content[key]]
    (HERE / f"agreement_{name}.json").write_text(json.dumps(content) + "\n")
    scored = sum(value is not None for value in content["per_query"]["average_precision"])
    print(name, scored, "of", queries, content["figures"])


if __name__ == "__main__":
    case("itself", 1, 0.9, 80, 80, itself=True)
    case("subset", 2, 0.6, 30, 90, itself=True)
    case("separate", 3, 1.2, 40, 70, itself=False)
