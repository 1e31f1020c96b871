"""Clustering metrics against enumeration of all labellings, and k-means on clear clusters."""

import itertools

import numpy as np
import pytest

from afa.errors import UserError
from afa.evaluation.metrics import clusters


def information(found, labels):
    total = 0.0
    for a, b in itertools.product(set(found), set(labels)):
        joint = np.mean((found == a) & (labels == b))
        if joint:
            total += joint * np.log(joint / np.mean(found == a) / np.mean(labels == b))
    return total


def entropy(found):
    share = np.unique(found, return_counts=True)[1] / len(found)
    return -np.sum(share * np.log(share))


FOUND, LABELS = np.array([0, 0, 0, 1, 1, 2]), np.array([3, 3, 5, 5, 5, 9])


def test_nmi_by_its_definition():
    expected = information(FOUND, LABELS) / ((entropy(FOUND) + entropy(LABELS)) / 2)
    assert clusters.normalised_mutual_information(FOUND, LABELS) == pytest.approx(expected)


def test_ami_is_corrected_by_the_mean_over_permutations():
    orders = itertools.permutations(LABELS)
    chance = np.mean([information(FOUND, np.array(order)) for order in orders])
    scale = (entropy(FOUND) + entropy(LABELS)) / 2
    expected = (information(FOUND, LABELS) - chance) / (scale - chance)
    assert clusters.adjusted_mutual_information(FOUND, LABELS) == pytest.approx(expected, abs=1e-12)


def test_random_clusters_have_high_nmi_but_no_ami():
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), 5)
    found = draw.integers(0, 40, 200)
    assert clusters.normalised_mutual_information(found, labels) > 0.5
    assert abs(clusters.adjusted_mutual_information(found, labels)) < 0.05


@pytest.mark.parametrize(
    "figure", [clusters.normalised_mutual_information, clusters.adjusted_mutual_information]
)
def test_equal_partitions_score_one_and_a_single_cluster_nothing(figure):
    assert figure(FOUND, 10 - FOUND) == pytest.approx(1)
    assert figure(np.zeros(6, int), LABELS) == pytest.approx(0, abs=1e-12)
    assert figure(np.zeros(6, int), np.ones(6, int)) == 1
    with pytest.raises(UserError, match="6 clusters for 5 labels"):
        figure(FOUND, LABELS[:5])


def clustered_vectors(classes=7, each=30, spread=0.1):
    draw = np.random.default_rng(3)
    labels = np.repeat(np.arange(classes), each)
    vectors = draw.normal(size=(classes, 16))[labels] + spread * draw.normal(size=(len(labels), 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), labels


def test_kmeans_finds_clusters_and_is_deterministic():
    vectors, labels = clustered_vectors()
    found = clusters.kmeans(vectors, 7, seed=1)
    assert clusters.adjusted_mutual_information(found, labels) > 0.8
    np.testing.assert_array_equal(found, clusters.kmeans(vectors, 7, seed=1))


def test_no_cluster_is_empty_even_with_equal_vectors():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    found = clusters.kmeans(vectors, 5)
    assert sorted(set(found.tolist())) == [0, 1, 2, 3, 4]
    assert len(set(clusters.kmeans(vectors, 12).tolist())) == 12


@pytest.mark.parametrize("wanted", [0, 211])
def test_the_number_of_clusters_is_checked(wanted):
    with pytest.raises(UserError, match=f"clusters={wanted} must lie between 1 and 210"):
        clusters.kmeans(clustered_vectors()[0], wanted)
