"""Figures beside the ranking: on descriptors whose pairs, clusters and ties are known."""

import dataclasses

import numpy as np
import pytest

from afa.data.types import ImageSet
from afa.evaluation.evaluator import ranks_of
from afa.evaluation.metrics import extra, pairs
from afa.evaluation.protocols import protocols


def described(classes=6, each=8, catalogue=0, spread=0.5, seed=0):
    """Images of which the last `catalogue` of a class are catalogue ones, and unit vectors."""
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


def test_an_oracle_is_perfect_and_noise_is_chance():
    vectors, images = described(spread=0.0)
    (protocol,) = protocols(images)
    found = figures(vectors, images, protocol)
    assert found["cmc"] == [1.0] * 20
    assert found["recall_at_1_over_ties"] == 1
    assert found["pairs"]["auroc"] == 1
    assert set(found["pairs"]["fnmr_at_fmr"].values()) == {0.0}
    assert (found["clusters"]["nmi"], found["clusters"]["clusters"]) == (pytest.approx(1), 6)
    vectors, images = described(each=40, spread=100.0)
    found = figures(vectors, images, protocols(images)[0])
    assert found["pairs"]["auroc"] == pytest.approx(0.5, abs=0.03)
    assert found["pairs"]["fnmr_at_fmr"]["0.1"] == pytest.approx(0.9, abs=0.03)
    assert found["clusters"]["ami"] == pytest.approx(0, abs=0.05)
    assert found["clusters"]["nmi"] > found["clusters"]["ami"]


def test_pairs_are_all_pairs_of_the_protocol():
    vectors, images = described(catalogue=1)
    whole, single = protocols(images)
    wild = ~images.catalogue
    found = figures(vectors, images, whole)
    assert found["pairs"]["same"] == 6 * 7 * 6 / 2
    assert found["pairs"]["different"] == 42 * 35 / 2
    expected = pairs.count_pairs(vectors[wild], images.labels[wild])
    assert found["pairs"]["auroc"] == pairs.auroc(expected)
    assert list(found["pairs"]["fnmr_at_fmr"]) == ["0.1", "0.01"]  # a thousandth cannot be told
    found = figures(vectors, images, single)
    assert (found["pairs"]["same"], found["pairs"]["different"]) == (42, 42 * 5)
    scores = vectors[wild] @ vectors[~wild].T
    same = images.labels[wild][:, None] == images.labels[~wild]
    exact = pairs.auroc(pairs.counted(scores.ravel(), same.ravel()))
    assert found["pairs"]["auroc"] == pytest.approx(exact, abs=1e-3)
    assert found["clusters"]["images"] == 48
    assert len(found["cmc"]) == 6  # of six in the gallery


def test_the_curve_begins_with_the_share_of_first_answers():
    vectors, images = described(spread=1.5)
    (protocol,) = protocols(images)
    found = figures(vectors, images, protocol)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -2)
    best = images.labels[np.argsort(-scores, axis=1)]
    hit = best[:, :20] == images.labels[:, None]
    np.testing.assert_allclose(found["cmc"], np.maximum.accumulate(hit, axis=1).mean(axis=0))
    assert 0 < found["cmc"][0] < 1
    assert found["recall_at_1_over_ties"] == pytest.approx(found["cmc"][0])


def test_equal_scores_are_averaged_however_many_there_are():
    """Eight copies of one image, of two classes: each finds 3 of 7 equal others right."""
    labels = np.arange(8) % 2
    images = ImageSet([b""] * 8, labels, tuple("abcdefgh"), np.zeros(8, bool))
    vectors = np.zeros((8, 4), np.float32)
    vectors[:, 0] = 1
    (protocol,) = protocols(images)
    found = figures(vectors, images, protocol)
    assert found["recall_at_1_over_ties"] == pytest.approx(3 / 7)
    assert found["cmc"][0] != pytest.approx(3 / 7)


def test_queries_with_nothing_to_find_do_not_count():
    vectors, images = described(spread=0.0)
    labels = images.labels.copy()
    labels[0] = 9  # alone in its class
    images = dataclasses.replace(images, labels=labels)
    found = figures(vectors, images, protocols(images)[0])
    # Of eight equal vectors one is of another class: it takes a share of the first places.
    assert found["recall_at_1_over_ties"] == pytest.approx((40 + 7 * 6 / 7) / 47)
    assert found["cmc"][-1] == 1
    assert found["clusters"]["clusters"] == 6


def test_a_large_split_is_measured_on_whole_classes(monkeypatch):
    monkeypatch.setattr(extra, "IMAGES", 20)
    vectors, images = described()
    found = figures(vectors, images, protocols(images)[0])
    assert found["clusters"] | {"nmi": 0, "ami": 0} == {
        "nmi": 0, "ami": 0, "clusters": 2, "images": 16,
    }  # fmt: skip
    assert found["pairs"]["same"] == 2 * 8 * 7 / 2
    labels = np.array([7, 7, 7, 3, 3, 5, 5, 5, 5])
    for seed in range(5):
        drawn = extra.whole_classes(labels, 7, seed)
        assert len(drawn) == 2 and set(drawn) < {3, 5, 7}
        np.testing.assert_array_equal(extra.whole_classes(labels, 9, seed), [3, 5, 7])


def test_classes_of_the_gallery_alone_are_no_pairs_to_tell():
    vectors, images = described(each=4)
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
    assert extra.told(found) == ""


def test_the_line_names_what_was_found():
    vectors, images = described(spread=0.0)
    told = extra.told(figures(vectors, images, protocols(images)[0]))
    assert told == (
        "AUROC of pairs 100.0 %; FNMR 0.0 % at FMR 10 %; FNMR 0.0 % at FMR 1 %; NMI 100.0 %, "
        "AMI 100.0 %; CMC at 20 100.0 %"
    )
