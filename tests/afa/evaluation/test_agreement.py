"""Our figures against those of pytorch-metric-learning and scikit-learn, on random data.

`tests/references/make_metrics.py` made the reference values.
"""

import json

import numpy as np
import pytest
import reference_figures
from paths import METRICS

from afa.evaluation.metrics import clusters, pairs
from afa.evaluation.metrics import retrieval as metrics
from afa.evaluation.metrics.retrieval import Ranked
from afa.retrieval.exact import positive_ranks

TOLERANCE = 1e-6
FIGURES = reference_figures.FIGURES | {
    "recall_at_1": lambda ranked: metrics.recall_at_k(ranked, 1),
    "recall_at_2": lambda ranked: metrics.recall_at_k(ranked, 2),
    "recall_at_4": lambda ranked: metrics.recall_at_k(ranked, 4),
    "recall_at_8": lambda ranked: metrics.recall_at_k(ranked, 8),
}


def near(value, expected):
    np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(params=["itself", "subset", "separate"])
def case(request):
    """A case and its vectors, normalised again because JSON has four digits."""
    given = json.loads((METRICS / f"agreement_{request.param}.json").read_text())
    for name in ("query", "gallery"):
        rows = np.array(given[name])
        given[name] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    for name in ("query_labels", "gallery_labels", "exclude"):
        given[name] = np.array(given[name], np.int64)
    return given


@pytest.fixture(params=["NumPy, all at once", "NumPy, in blocks", "on the devices"])
def ranked(request, case):
    """The rankings by each of our implementations."""
    labels, offered, exclude = (case[n] for n in ("query_labels", "gallery_labels", "exclude"))
    itself = exclude[:, None] == np.arange(len(offered))
    right = (labels[:, None] == offered) & ~itself
    if request.param.endswith("once"):
        return Ranked.from_scores(case["query"] @ case["gallery"].T, right, itself)
    if request.param.endswith("blocks"):
        rows = [[np.flatnonzero(row) for row in part] for part in (right, itself)]
        return Ranked.from_vectors(case["query"], case["gallery"], *rows, block=500)
    ranks = np.asarray(positive_ranks(case["query"], case["gallery"], labels, offered, exclude))
    return Ranked(ranks, (ranks >= 0).sum(axis=1))


def test_means_over_queries_and_over_classes(case, ranked):
    assert len(case["figures"]) == len(case["class_means"]) == 5
    for name, expected in case["figures"].items():
        near(metrics.scored_mean(FIGURES[name](ranked)), expected)
    for name, expected in case["class_means"].items():
        near(metrics.class_mean(FIGURES[name](ranked), case["query_labels"]), expected)


def test_every_query(case, ranked):
    assert len(case["per_query"]) == 6
    for name, expected in case["per_query"].items():
        values = np.array([np.nan if each is None else each for each in expected])
        near(FIGURES[name](ranked), values)
        assert 0 < np.nanmean(values) < 1
    curve = metrics.cumulative_match(ranked, 8)
    for k in (1, 2, 4, 8):
        known = [each for each in case["per_query"][f"recall_at_{k}"] if each is not None]
        near(curve[k - 1], np.mean(known))


def test_pairs(case):
    rows, labels = case["gallery"], case["gallery_labels"]
    i, j = np.triu_indices(len(rows), 1)
    scores = np.einsum("pd,pd->p", rows[i].astype(np.float64), rows[j])
    every = pairs.counted(scores, labels[i] == labels[j])
    near(pairs.auroc(every), case["pairs"]["auroc"])
    binned = pairs.count_pairs(rows, labels)
    assert abs(pairs.auroc(binned) - case["pairs"]["auroc"]) <= binned.resolution + TOLERANCE
    assert len(case["pairs"]["fnmr_at_fmr"]) == 3
    for rate, expected in case["pairs"]["fnmr_at_fmr"].items():
        near(pairs.fnmr_at_fmr(every, float(rate))[0], expected)


def test_clusters(case):
    found = np.array(case["clusters"]["found"])
    labels = case["gallery_labels"]
    near(clusters.normalised_mutual_information(found, labels), case["clusters"]["nmi"])
    near(clusters.adjusted_mutual_information(found, labels), case["clusters"]["ami"])
