"""Geometric verification: do the local features of two images match under one affine map?

Philbin et al. 2007 ("Object Retrieval with Large Vocabularies", section 4): local features of query
and candidate are matched, an affine map is fitted by RANSAC (Fischler and Bolles 1981), and its
inliers are evidence beside the global similarity. Matches are mutual nearest neighbours among the
local features with the highest attention (DELF, Noh et al. 2017). Shapes do not depend on the
number of matches, so all candidates of a query and all hypotheses are one compiled program.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int64

from afa.models.heads import LocalFeatures
from afa.retrieval.rerank.contract import ImageFeatures, ImageScorer, neighbours

CANDIDATES = 100  # results that are verified; the others have no evidence
HYPOTHESES = 128
SEED = 0  # seed of the minimal samples
MINIMUM = 3  # matches that determine an affine map; they are inliers of any hypothesis
SMALLEST = 1e-3  # least area of a sample's parallelogram, as a share of the image area
LARGEST_CHANGE = 8.0  # largest change of area between two views of one object
SHARPNESS = 3.0  # the weight of a match is its similarity to this power


class Matches(NamedTuple):
    """Matched pairs of local features, largest weights first.

    Attributes:
      source, target: positions in the query and in the candidate, as shares of the image side.
      weight: similarity to the power of SHARPNESS; 0 for padding.
    """

    source: Float[Array, "m 2"]
    target: Float[Array, "m 2"]
    weight: Float[Array, "m"]


class Affine(NamedTuple):
    """target = matrix source + shift; ignored unless `sound` (not degenerate)."""

    matrix: Float[Array, "2 2"]
    shift: Float[Array, "2"]
    sound: Bool[Array, ""]


def local_matches(gallery: ImageFeatures, *, scale: float) -> ImageScorer:
    """Evidence of all matches, without geometry; the baseline of geometric verification.

    Args:
      gallery: features with local features.
      scale: image scale of the local features.
    """
    return _scorer(gallery, scale, None)


def geometric_verification(
    gallery: ImageFeatures, *, scale: float, tolerance: float
) -> ImageScorer:
    """Evidence of the matches that are consistent with one affine map.

    Args:
      gallery: features with local features.
      scale: image scale of the local features.
      tolerance: largest distance of an inlier to its mapped position, as a share of the image side.
    """
    return _scorer(gallery, scale, tolerance)


def _scorer(gallery: ImageFeatures, scale: float, tolerance: float | None) -> ImageScorer:
    def score(
        queries: ImageFeatures, exclude: Int64[np.ndarray, "q"]
    ) -> Float32[np.ndarray, "q n"]:
        found = neighbours(queries.vectors, gallery.vectors, CANDIDATES, exclude)[1]
        of_queries, of_gallery = queries.local_features[scale], gallery.local_features[scale]
        scores = np.zeros((len(found), len(gallery.vectors)), np.float32)
        for i, rows in enumerate(found):
            candidates = jax.tree.map(lambda part, rows=rows: part[rows], of_gallery)
            one = jax.tree.map(lambda part, i=i: part[i : i + 1], of_queries)
            scores[i, rows] = evidence(one, candidates, tolerance)
        return scores

    return score


def evidence(
    query: LocalFeatures, candidates: LocalFeatures, tolerance: float | None
) -> Float32[np.ndarray, "c"]:
    """Computes the evidence that one query and each candidate show the same object.

    Sum of the weights of the matches, divided by the number of local features: between 0 and 1.
    With geometry, the sum is over inliers, scaled by (n - 3) / n for n inliers, because three
    matches always agree.

    Args:
      query: local features of one image.
      candidates: local features of any number of images, with as many features each.
      tolerance: as in `geometric_verification`; None for no geometry.
    """
    count = len(candidates.strength)
    limit = np.float32(0 if tolerance is None else tolerance)
    found = [np.zeros(0, np.float32)]
    for begin in range(0, count, CANDIDATES):
        rows = np.minimum(np.arange(begin, begin + CANDIDATES), count - 1)
        block = jax.tree.map(lambda part, rows=rows: part[rows], candidates)
        found.append(np.asarray(_evidence(query, block, draws(), limit, tolerance is not None)))
    return np.concatenate(found)[:count]


@functools.cache
def draws(hypotheses: int = HYPOTHESES, seed: int = SEED) -> Float32[np.ndarray, "h 3"]:
    """Random numbers in [0, 1) that select the three matches of every hypothesis."""
    return np.random.default_rng(seed).random((hypotheses, MINIMUM), np.float32)


@functools.partial(jax.jit, static_argnums=4)
def _evidence(
    query: LocalFeatures,
    candidates: LocalFeatures,
    draw: Float[Array, "h 3"],
    tolerance: Float[Array, ""],
    verified: bool,
) -> Float[Array, "c"]:
    def one(candidate: LocalFeatures) -> Float[Array, ""]:
        matches = mutual(jax.tree.map(lambda part: part[0], query), candidate)
        if not verified:
            return matches.weight.mean()
        agree = consensus(matches, draw, tolerance)
        number = agree.sum()
        beyond = jnp.maximum(number - MINIMUM, 0) / jnp.maximum(number, 1)
        return beyond * jnp.mean(matches.weight * agree)

    return jax.vmap(one)(candidates)


def mutual(query: LocalFeatures, candidate: LocalFeatures) -> Matches:
    """Matches local features that are mutual nearest neighbours; zero descriptors do not match.

    Args:
      query, candidate: local features of one image each, without a leading axis.
    """
    similarity = query.descriptor @ candidate.descriptor.T
    nearest, back = jnp.argmax(similarity, axis=1), jnp.argmax(similarity, axis=0)
    best = jnp.maximum(jnp.max(similarity, axis=1), 0)
    weight = jnp.where(back[nearest] == jnp.arange(len(nearest)), best**SHARPNESS, 0)
    order = jnp.argsort(-weight, stable=True)
    return Matches(query.position[order], candidate.position[nearest[order]], weight[order])


def consensus(
    matches: Matches, draw: Float[Array, "h 3"], tolerance: Float[Array, ""]
) -> Bool[Array, "m"]:
    """Returns the inliers of the best hypothesis, or of the map refitted to them if better.

    A set of inliers is better if the sum of its weights is larger. No inliers with fewer than three
    matches.
    """
    number = jnp.sum(matches.weight > 0)
    samples = jax.vmap(lambda each: triple(each, number))(draw)
    found = jax.vmap(through)(matches.source[samples], matches.target[samples])
    agree = jax.vmap(lambda each: inliers(each, matches, tolerance))(found)
    total = agree @ matches.weight
    best = agree[jnp.argmax(total)]
    again = inliers(fit(matches, best), matches, tolerance)
    better = again @ matches.weight > total.max()
    return jnp.where(better, again, best) & (number >= MINIMUM)


def triple(draw: Float[Array, "3"], count: Int[Array, ""]) -> Int[Array, "3"]:
    """Returns three different integers below `count`, uniformly; arbitrary if `count` < 3."""
    picked = (draw * (count - jnp.arange(MINIMUM))).astype(jnp.int32)
    first = picked[0]
    second = picked[1] + (picked[1] >= first)  # skips the first number
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    third = picked[2] + (picked[2] >= low)
    return jnp.stack([first, second, third + (third >= high)])


def through(source: Float[Array, "3 2"], target: Float[Array, "3 2"]) -> Affine:
    """Returns the affine map of three points; not sound if source or target are collinear."""
    before, after = (source[1:] - source[0]).T, (target[1:] - target[0]).T
    matrix, sound = _quotient(after, before, SMALLEST)
    sound &= jnp.abs(_determinant(after)) > SMALLEST
    return Affine(matrix, target[0] - matrix @ source[0], sound)


def fit(matches: Matches, chosen: Bool[Array, "m"]) -> Affine:
    """Fits an affine map to the chosen matches by weighted least squares."""
    weight = matches.weight * chosen
    share = weight / jnp.maximum(weight.sum(), 1e-12)
    source, target = share @ matches.source, share @ matches.target
    before, after = matches.source - source, matches.target - target
    spread = (before * share[:, None]).T @ before
    matrix, sound = _quotient((after * share[:, None]).T @ before, spread, SMALLEST**2)
    return Affine(matrix, target - matrix @ source, sound)


def inliers(affine: Affine, matches: Matches, tolerance: Float[Array, ""]) -> Bool[Array, "m"]:
    """Returns the matches whose mapped source is within `tolerance` of the target."""
    change = jnp.abs(_determinant(affine.matrix))
    plausible = affine.sound & (change < LARGEST_CHANGE) & (change > 1 / LARGEST_CHANGE)
    error = matches.source @ affine.matrix.T + affine.shift - matches.target
    near = jnp.sum(jnp.square(error), axis=-1) <= tolerance**2
    return plausible & near & (matches.weight > 0)


def _determinant(matrix: Float[Array, "2 2"]) -> Float[Array, ""]:
    return matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]


def _quotient(
    left: Float[Array, "2 2"], right: Float[Array, "2 2"], smallest: float
) -> tuple[Float[Array, "2 2"], Bool[Array, ""]]:
    """Returns left times the inverse of right, and whether right is invertible."""
    area = _determinant(right)
    sound = jnp.abs(area) > smallest
    adjugate = jnp.array([[right[1, 1], -right[0, 1]], [-right[1, 0], right[0, 0]]])
    return left @ adjugate / jnp.where(sound, area, 1.0), sound
