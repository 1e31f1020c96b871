"""Geometric verification of point sets with a known affine map, and of transformed images."""

import itertools
import time
from collections import Counter

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from arrays import apply, near, normal, unit, variables_of

from afa.errors import UserError
from afa.models.heads import LocalFeatures, LocalHead
from afa.retrieval.rerank import contract, geometry, posterior
from afa.retrieval.rerank.geometry import Matches

TURN = np.array([[0.76, -0.64], [0.64, 0.76]]) * 0.7  # rotation by 40 degrees, scale 0.7
SHIFT = np.array([0.45, -0.05])
THREE = jnp.float32([[0.1, 0.2], [0.8, 0.3], [0.4, 0.9]])
TOLERANCE = jnp.float32(0.01)


def features_at(position, descriptor, images=1):
    """The same local features for each of `images` images, all equally strong."""
    one = LocalFeatures(
        np.full(len(position), 1 / len(position), np.float32),
        np.asarray(position, np.float32),
        np.asarray(descriptor, np.float32),
    )
    return LocalFeatures(*(np.repeat(part[None], images, axis=0) for part in one))


def joined(*images):
    return LocalFeatures(*(np.concatenate(parts) for parts in zip(*images, strict=True)))


def first(local_features):
    return LocalFeatures(*(part[0] for part in local_features))


def transformed(seed, right, wrong):
    """A query, a candidate whose first `right` local features follow the map and whose others do
    not, and their order in the candidate."""
    draw = np.random.default_rng(seed)
    source = draw.random((right + wrong, 2))
    target = source @ TURN.T + SHIFT
    target[right:] = draw.random((wrong, 2))
    order = draw.permutation(right + wrong)
    descriptor = np.asarray(unit(seed, right + wrong, 32))
    noise = np.asarray(unit(seed + 1, right + wrong, 32))
    seen = descriptor + 0.2 * noise
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    return features_at(source, descriptor), features_at(target[order], seen[order]), order


# ---- matches -----------------------------------------------------------------------------------


def test_matches_are_mutual_nearest_neighbours_with_the_best_first():
    query = features_at(np.random.default_rng(0).random((9, 2)), unit(1, 9, 4))
    candidate = features_at(np.random.default_rng(2).random((9, 2)), unit(3, 9, 4))
    similarity = query.descriptor[0] @ candidate.descriptor[0].T
    pairs = [
        (i, j)
        for i, j in itertools.product(range(9), range(9))
        if similarity[i].argmax() == j and similarity[:, j].argmax() == i
    ]
    pairs.sort(key=lambda pair: -similarity[pair])
    assert 3 <= len(pairs) < 9
    found = geometry.mutual(first(query), first(candidate))
    count = len(pairs)
    near(found.weight[:count], [similarity[pair] ** 3 for pair in pairs], 1e-4)
    near(found.source[:count], [query.position[0, i] for i, _ in pairs])
    near(found.target[:count], [candidate.position[0, j] for _, j in pairs])
    np.testing.assert_array_equal(found.weight[count:], 0)


@pytest.mark.parametrize("count", [3, 5])
def test_samples_are_three_different_matches_uniformly(count):
    draws = np.random.default_rng(0).random((6000, 3), np.float32)
    found = jax.vmap(lambda each: geometry.triple(each, jnp.int32(count)))(jnp.asarray(draws))
    seen = Counter(map(tuple, np.asarray(found).tolist()))
    expected = set(itertools.permutations(range(count), 3))
    assert set(seen) == expected
    usual = 6000 / len(expected)
    assert all(abs(number - usual) < 5 * usual**0.5 for number in seen.values())


def test_samples_come_from_a_seed():
    np.testing.assert_array_equal(geometry.draws(8, 3), geometry.draws.__wrapped__(8, 3))
    assert np.any(geometry.draws(8, 3) != geometry.draws(8, 4))


# ---- maps --------------------------------------------------------------------------------------


def test_the_map_through_three_points():
    found = geometry.through(THREE, jnp.float32(THREE @ TURN.T + SHIFT))
    assert found.sound
    near(found.matrix, TURN, 1e-4)
    near(found.shift, SHIFT, 1e-4)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "points", [[[0.1, 0.1], [0.5, 0.5], [0.9, 0.9]], [[0.2, 0.3]] * 3], ids=["line", "point"]
)
def test_collinear_points_determine_no_map(side, points):
    pair = [THREE, THREE]
    pair[side] = jnp.float32(points)
    found = geometry.through(*pair)
    assert not found.sound
    assert np.isfinite(found.matrix).all()


def test_the_fitted_map_has_least_weighted_squares():
    draw = np.random.default_rng(4)
    source, weight = draw.random((20, 2)), draw.random(20)
    target = source @ TURN.T + SHIFT + 0.05 * draw.normal(size=(20, 2))
    chosen = np.arange(20) < 15
    found = geometry.fit(
        Matches(*(jnp.asarray(each, jnp.float32) for each in (source, target, weight))),
        jnp.asarray(chosen),
    )
    root = np.sqrt(weight * chosen)[:, None]
    wide = np.concatenate([source, np.ones((20, 1))], axis=1)
    expected = np.linalg.lstsq(wide * root, target * root, rcond=None)[0]
    assert found.sound
    near(found.matrix, expected[:2].T, 1e-3)
    near(found.shift, expected[2], 1e-3)
    line = Matches(jnp.stack([jnp.arange(9.0), jnp.arange(9.0)], 1) / 9, jnp.ones((9, 2)),
                   jnp.ones(9))  # fmt: skip
    assert not geometry.fit(line, jnp.ones(9, bool)).sound


@pytest.mark.parametrize("matrix", [[[3.0, 0], [0, 3.0]], [[0.3, 0], [0, 0.3]]])
def test_a_map_that_changes_area_too_much_has_no_inliers(matrix):
    source = jnp.asarray(np.random.default_rng(0).random((5, 2)), jnp.float32)
    affine = geometry.Affine(jnp.asarray(matrix), jnp.zeros(2), jnp.asarray(True))
    matches = Matches(source, source @ affine.matrix.T, jnp.ones(5))
    assert not geometry.inliers(affine, matches, TOLERANCE).any()
    mild = affine._replace(matrix=jnp.eye(2) * 1.5)
    matches = matches._replace(target=1.5 * source)
    assert geometry.inliers(mild, matches, TOLERANCE).all()


# ---- consensus and evidence --------------------------------------------------------------------


@pytest.mark.parametrize(("right", "wrong"), [(40, 0), (30, 20), (25, 35)])
def test_inliers_are_those_that_follow_the_map(right, wrong):
    query, candidate, order = transformed(right, right, wrong)
    matches = geometry.mutual(first(query), first(candidate))
    found = np.asarray(geometry.consensus(matches, jnp.asarray(geometry.draws()), TOLERANCE))
    where = {tuple(p): i for i, p in enumerate(query.position[0].tolist())}
    inliers = {where[tuple(p)] for p in np.asarray(matches.source)[found].tolist()}
    assert inliers >= set(range(right))
    assert len(inliers - set(range(right))) <= 1  # one may be there by chance
    assert sorted(order) == list(range(right + wrong))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_matches_have_no_consensus(count):
    points = jnp.asarray(np.random.default_rng(0).random((6, 2)), jnp.float32)
    matches = Matches(points, points, jnp.where(jnp.arange(6) < count, 1.0, 0.0))
    assert not geometry.consensus(matches, jnp.asarray(geometry.draws()), TOLERANCE).any()


def test_fitting_again_finds_inliers_that_no_sample_reaches():
    draw = np.random.default_rng(5)
    source = draw.random((60, 2))
    target = source @ TURN.T + SHIFT + 0.012 * draw.normal(size=(60, 2))
    matches = Matches(*(jnp.asarray(x, jnp.float32) for x in (source, target, np.ones(60))))
    limit, few = jnp.float32(0.03), jnp.asarray(geometry.draws(3, 1))
    found = geometry.consensus(matches, few, limit).sum()
    samples = jax.vmap(lambda each: geometry.triple(each, jnp.int32(60)))(few)
    maps = jax.vmap(geometry.through)(matches.source[samples], matches.target[samples])
    counts = jax.vmap(lambda each: geometry.inliers(each, matches, limit).sum())(maps)
    assert found > counts.max()


def test_evidence_is_higher_for_a_transformed_image_than_for_another():
    query, candidate, _ = transformed(3, 30, 10)
    foreign = features_at(np.random.default_rng(8).random((40, 2)), unit(9, 40, 32))
    # Same descriptors at random positions: matches without a common map.
    scrambled = features_at(np.random.default_rng(7).random((40, 2)), candidate.descriptor[0])
    images = joined(candidate, scrambled, foreign)
    same, mixed, other = geometry.evidence(query, images, 0.02)
    assert same > 0.5
    assert same > 4 * mixed
    assert same > 4 * other
    matches = geometry.evidence(query, images, None)
    near(matches[0], matches[1])
    assert matches[0] > 4 * matches[2]
    assert min(matches.min(), other, mixed) >= 0
    assert matches.max() <= 1


def test_evidence_is_the_weight_of_the_inliers_beyond_three():
    points = np.random.default_rng(0).random((10, 2))
    for count, expected in ((10, 0.7), (4, 0.1), (3, 0), (2, 0), (0, 0)):
        descriptor = np.asarray(np.eye(20)[:10])
        seen = np.where(np.arange(10)[:, None] < count, descriptor, np.eye(20)[10:])
        found = geometry.evidence(features_at(points, descriptor), features_at(points, seen), 0.01)
        near(found, [expected], 1e-4)
        matches = geometry.evidence(
            features_at(points, descriptor), features_at(points, seen), None
        )
        near(matches, [count / 10], 1e-4)


def test_degenerate_local_features_are_no_evidence():
    descriptor, points = unit(0, 10, 16), np.random.default_rng(0).random((10, 2))
    line = np.stack([points[:, 0], points[:, 0]], axis=1)
    usual = features_at(points, descriptor)
    for other in (line, np.full((10, 2), 0.5)):
        odd = features_at(other, descriptor)
        assert geometry.evidence(usual, odd, 0.05) == 0
        assert geometry.evidence(odd, usual, 0.05) == 0
        assert geometry.evidence(odd, odd, 0.05) == 0
    zero = features_at(points, np.zeros((10, 16)))
    for tolerance in (0.05, None):
        assert geometry.evidence(zero, zero, tolerance) == 0


def test_any_number_of_candidates_uses_one_program(monkeypatch):
    traced, mutual = [], geometry.mutual
    monkeypatch.setattr(geometry, "mutual", lambda *given: traced.append(1) or mutual(*given))
    query, candidate, _ = transformed(1, 10, 3)  # a number of features that no other test uses
    many = joined(candidate, *(transformed(i, 10, 3)[1] for i in range(2, 8)))
    scores = geometry.evidence(query, many, 0.05)
    assert scores.shape == (7,)
    assert scores[0] > 0
    for count in (0, 1, 3, 7):
        some = LocalFeatures(*(x[:count] for x in many))
        np.testing.assert_array_equal(geometry.evidence(query, some, 0.05), scores[:count])
        geometry.evidence(query, some, 0.02)
    assert len(traced) == 1
    monkeypatch.setattr(geometry, "CANDIDATES", 3)
    near(geometry.evidence(query, many, 0.05), scores)


def test_a_hundred_candidates_take_less_than_half_a_second():
    count, dim = 128, 128
    draw = np.random.default_rng(0)
    descriptor = draw.normal(size=(101, count, dim)).astype(np.float32)
    descriptor /= np.linalg.norm(descriptor, axis=-1, keepdims=True)
    position = draw.random((101, count, 2), np.float32)
    images = LocalFeatures(np.full((101, count), 1 / count, np.float32), position, descriptor)
    query, rest = (LocalFeatures(*(x[part] for x in images)) for part in (slice(1), slice(1, None)))
    spent = []
    for _ in range(4):  # the first compiles
        began = time.perf_counter()
        geometry.evidence(query, rest, 0.25)
        spent.append(time.perf_counter() - began)
    assert min(spent[1:]) < 0.5


# ---- re-ranking --------------------------------------------------------------------------------


def images_of(vectors, local_features):
    return contract.ImageFeatures(
        vectors, np.zeros((len(vectors), 0), np.float32), {1.0: local_features}
    )


def test_only_the_first_results_are_verified(monkeypatch):
    monkeypatch.setattr(geometry, "CANDIDATES", 5)
    query, candidate, _ = transformed(1, 12, 0)
    vectors = np.asarray(unit(0, 9, 4))
    gallery = images_of(vectors, joined(*[candidate] * 9))
    queries = images_of(vectors[:1], query)
    for score in (
        geometry.local_matches(gallery, scale=1.0),
        geometry.geometric_verification(gallery, scale=1.0, tolerance=0.05),
    ):
        found = score(queries, np.zeros(1, np.int64))[0]
        similarity = vectors @ vectors[0]
        similarity[0] = -2  # the query itself
        assert set(np.flatnonzero(found)) == set(np.argsort(-similarity)[:5])


def test_an_empty_gallery_is_an_error():
    query, candidate, _ = transformed(1, 12, 0)
    empty = images_of(np.zeros((0, 4), np.float32), LocalFeatures(*(x[:0] for x in candidate)))
    score = geometry.geometric_verification(empty, scale=1.0, tolerance=0.05)
    with pytest.raises(UserError, match="gallery is empty"):
        score(images_of(np.asarray(unit(0, 1, 4)), query), np.full(1, -1))


def test_agreement_is_the_probability_of_one_class():
    shares = np.array([[0.5, 0.5, 0], [0.2, 0.3, 0.5]], np.float32)
    queries = contract.ImageFeatures(np.asarray(unit(0, 2, 4)), shares)
    gallery = contract.ImageFeatures(np.asarray(unit(1, 3, 4)), np.eye(3, dtype=np.float32))
    found = posterior.class_agreement(gallery)(queries, np.full(2, -1))
    near(found, shares)


# ---- local features of images ----------------------------------------------------------------


def test_the_strongest_local_features_of_a_map():
    mid = normal(2, 3, 4, 5, 6)
    head = LocalHead(7)
    variables = variables_of(head, mid)
    attention, descriptors = map(np.asarray, apply(head, variables, mid, method="local_features"))
    found = apply(head, variables, mid, 6, method="strongest")
    order = np.argsort(-attention, axis=1)[:, :6]
    near(found.strength, np.take_along_axis(attention, order, 1))
    near(found.descriptor, np.take_along_axis(descriptors, order[..., None], 1))
    near(found.position[..., 0], (order % 5 + 0.5) / 5)
    near(found.position[..., 1], (order // 5 + 0.5) / 4)
    assert apply(head, variables, mid, 99, method="strongest").strength.shape == (3, 20)


def blobs(seed, side=96):
    noise = np.random.default_rng(seed).random((side, side, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    return (smooth - smooth.min()) / np.ptp(smooth)


def test_a_rotated_and_shifted_image_is_retrieved():
    context = tiny.context(tiny.config())
    variables = tiny.state(context).variables
    turn = cv2.getRotationMatrix2D((48, 48), 8, 1.05) + np.array([[0, 0, 9], [0, 0, -6]])
    queries = [blobs(seed) for seed in range(3)]
    again = [cv2.warpAffine(q, turn, (96, 96), borderMode=cv2.BORDER_REFLECT) for q in queries]
    images = jnp.asarray(np.stack([*queries, *again]))
    local_features = jax.jit(lambda v, x: context.networks.local_features(v, x, 100))(
        variables, images
    )
    vectors = np.tile(np.asarray(unit(0, 1, 4)), (3, 1))  # equal global descriptors
    parts = [images_of(vectors, LocalFeatures(*(np.asarray(x)[i : i + 3] for x in local_features)))
             for i in (0, 3)]  # fmt: skip
    score = geometry.geometric_verification(parts[1], scale=1.0, tolerance=0.08)
    found = score(parts[0], np.full(3, -1))
    own = np.diagonal(found)
    foreign = found[~np.eye(3, dtype=bool)].max()
    assert own.min() > 1.5 * foreign
