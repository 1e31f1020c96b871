"""Extra metrics of descriptors whose pairs, clusters and ties are known."""

import dataclasses

import numpy as np
import pytest

from afa.data.types import ImageSet
from afa.evaluation.evaluator import ranks_of
from afa.evaluation.metrics import extra, pairs
from afa.evaluation.protocols import protocols


def clustered_images(classes=6, each=8, catalogue=0, spread=0.5, seed=0):
    """Unit vectors, and images of which the last `catalogue` of each class are catalogue images."""
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    vectors = draw.normal(size=(classes, 16))[labels]
    vectors += spread * draw.normal(size=vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = tuple(map(str, range(len(labels))))
    clean = np.tile(np.arange(each) >= each - catalogue, classes)
    images = ImageSet([b""] * len(labels), labels, names, clean)
    return vectors.astype(np.float32), images


def figures(vectors, images, protocol):
    queries, gallery = vectors[protocol.queries], vectors[protocol.gallery]
    ranks = ranks_of(queries, gallery, images, protocol)
    return extra.figures(queries, gallery, ranks, images, protocol)


def test_perfect_and_random_descriptors():
    vectors, images = clustered_images(spread=0.0)
    (protocol,) = protocols(images)
    found = figures(vectors, images, protocol)
    assert found["cmc"] == [1.0] * 20
    assert found["recall_at_1_over_ties"] == 1
    assert found["pairs"]["auroc"] == 1
    assert set(found["pairs"]["fnmr_at_fmr"].values()) == {0.0}
    assert (found["clusters"]["nmi"], found["clusters"]["clusters"]) == (pytest.approx(1), 6)
    vectors, images = clustered_images(each=40, spread=100.0)
    found = figures(vectors, images, protocols(images)[0])
    assert found["pairs"]["auroc"] == pytest.approx(0.5, abs=0.03)
    assert found["pairs"]["fnmr_at_fmr"]["0.1"] == pytest.approx(0.9, abs=0.03)
    assert found["clusters"]["ami"] == pytest.approx(0, abs=0.05)
    assert found["clusters"]["nmi"] > found["clusters"]["ami"]


def test_pairs_of_each_protocol():
    vectors, images = clustered_images(catalogue=1)
    leave_one_out, catalogue = protocols(images)
    wild = ~images.catalogue
    found = figures(vectors, images, leave_one_out)
    assert found["pairs"]["same"] == 6 * 7 * 6 / 2
    assert found["pairs"]["different"] == 42 * 35 / 2
    expected = pairs.count_pairs(vectors[wild], images.labels[wild])
    assert found["pairs"]["auroc"] == pairs.auroc(expected)
    assert list(found["pairs"]["fnmr_at_fmr"]) == ["0.1", "0.01"]  # too few pairs for 0.001
    found = figures(vectors, images, catalogue)
    assert (found["pairs"]["same"], found["pairs"]["different"]) == (42, 42 * 5)
    scores = vectors[wild] @ vectors[~wild].T
    same = images.labels[wild][:, None] == images.labels[~wild]
    exact = pairs.auroc(pairs.counted(scores.ravel(), same.ravel()))
    assert found["pairs"]["auroc"] == pytest.approx(exact, abs=1e-3)
    assert found["clusters"]["images"] == 48
    assert len(found["cmc"]) == 6  # the gallery has six images


def test_cmc_curve_starts_at_recall_at_1():
    vectors, images = clustered_images(spread=1.5)
    (protocol,) = protocols(images)
    found = figures(vectors, images, protocol)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -2)
    best = images.labels[np.argsort(-scores, axis=1)]
    hit = best[:, :20] == images.labels[:, None]
    np.testing.assert_allclose(found["cmc"], np.maximum.accumulate(hit, axis=1).mean(axis=0))
    assert 0 < found["cmc"][0] < 1
    assert found["recall_at_1_over_ties"] == pytest.approx(found["cmc"][0])


def test_recall_at_1_over_many_ties():
    """Eight equal vectors of two classes: 3 of the 7 tied results of each query are positives."""
    labels = np.arange(8) % 2
    images = ImageSet([b""] * 8, labels, tuple("abcdefgh"), np.zeros(8, bool))
    vectors = np.zeros((8, 4), np.float32)
    vectors[:, 0] = 1
    (protocol,) = protocols(images)
    found = figures(vectors, images, protocol)
    assert found["recall_at_1_over_ties"] == pytest.approx(3 / 7)
    assert found["cmc"][0] != pytest.approx(3 / 7)


def test_queries_without_positives_are_left_out():
    vectors, images = clustered_images(spread=0.0)
    labels = images.labels.copy()
    labels[0] = 9  # a class of one image
    images = dataclasses.replace(images, labels=labels)
    found = figures(vectors, images, protocols(images)[0])
    # One of eight equal vectors is of another class, so it is first in some orders of the ties.
    assert found["recall_at_1_over_ties"] == pytest.approx((40 + 7 * 6 / 7) / 47)
    assert found["cmc"][-1] == 1
    assert found["clusters"]["clusters"] == 6


def test_large_splits_are_subsampled_by_class(monkeypatch):
    monkeypatch.setattr(extra, "MAX_IMAGES", 20)
    vectors, images = clustered_images()
    found = figures(vectors, images, protocols(images)[0])
    assert found["clusters"] | {"nmi": 0, "ami": 0} == {
        "nmi": 0, "ami": 0, "clusters": 2, "images": 16,
    }  # fmt: skip
    assert found["pairs"]["same"] == 2 * 8 * 7 / 2
    labels = np.array([7, 7, 7, 3, 3, 5, 5, 5, 5])
    for seed in range(5):
        drawn = extra.draw_classes(labels, 7, seed)
        assert len(drawn) == 2 and set(drawn) < {3, 5, 7}
        np.testing.assert_array_equal(extra.draw_classes(labels, 9, seed), [3, 5, 7])


def test_classes_without_queries_are_left_out():
    vectors, images = clustered_images(each=4)
    roles = np.arange(24) % 4 > 0
    images = dataclasses.replace(images, gallery=roles | (images.labels > 3))
    (protocol,) = protocols(images)
    assert (protocol.name, len(protocol.queries), len(protocol.gallery)) == ("query_gallery", 4, 20)
    found = figures(vectors, images, protocol)
    assert (found["pairs"]["same"], found["pairs"]["different"]) == (4 * 3, 4 * 9)
    assert found["clusters"]["clusters"] == 4
    one = dataclasses.replace(images, gallery=roles | (images.labels > 0))
    found = figures(vectors, one, protocols(one)[0])
    assert set(found) == {"cmc", "recall_at_1_over_ties"}
    assert extra.summary(found) == ""


def test_summary_line():
    vectors, images = clustered_images(spread=0.0)
    assert extra.summary(figures(vectors, images, protocols(images)[0])) == (
        "AUROC of pairs 100.0 %; FNMR 0.0 % at FMR 10 %; FNMR 0.0 % at FMR 1 %; NMI 100.0 %, "
        "AMI 100.0 %; CMC at 20 100.0 %"
    )
