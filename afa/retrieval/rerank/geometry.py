"""Geometric verification: do the places of two images match under one affine map?

Philbin et al. 2007 ("Object Retrieval with Large Vocabularies", section 4): matches between the
local descriptors of query and candidate, an affine map by RANSAC (Fischler and Bolles 1981), and
its inliers as evidence beside the global similarity. Matches are mutual nearest neighbours among
the places that draw attention (DELF, Noh et al. 2017). Everything has one shape, however many
matches there are: all candidates of a query and all hypotheses of each are one compiled program.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int64

from afa.models.heads import LocalFeatures
from afa.retrieval.rerank.contract import ImageFeatures, ImageScorer, neighbours

CANDIDATES = 100  # results that are looked at; the others have no evidence
HYPOTHESES = 128
SEED = 0  # of the samples that hypotheses are made from
MINIMUM = 3  # matches that fix an affine map: they fit it whether it is right or not
SMALLEST = 1e-3  # area of a sample's parallelogram, as a share of the image's
LARGEST_CHANGE = 8.0  # of area, between two views of one object
SHARPNESS = 3.0  # exponent of a match's similarity, which is its weight


class Matches(NamedTuple):
    """Pairs of places, those that count first.

    Attributes:
      source, target: positions in the query and in the candidate.
      weight: similarity to the power of SHARPNESS; 0 fills up to one shape.
    """

    source: Float[Array, "m 2"]
    target: Float[Array, "m 2"]
    weight: Float[Array, "m"]


class Affine(NamedTuple):
    """target = matrix source + shift; of no account where it is not sound."""

    matrix: Float[Array, "2 2"]
    shift: Float[Array, "2"]
    sound: Bool[Array, ""]


def local_matches(gallery: ImageFeatures, *, scale: float) -> ImageScorer:
    """Evidence of the matches alone, wherever they lie: what geometry is measured against.

    Args:
      gallery: with places.
      scale: of the images that the places are of.
    """
    return _scorer(gallery, scale, None)


def geometric_verification(
    gallery: ImageFeatures, *, scale: float, tolerance: float
) -> ImageScorer:
    """Evidence of the matches that agree on one affine map.

    Args:
      gallery: with places.
      scale: of the images that the places are of.
      tolerance: distance to where the map takes a place, as a share of the image's side.
    """
    return _scorer(gallery, scale, tolerance)


def _scorer(gallery: ImageFeatures, scale: float, tolerance: float | None) -> ImageScorer:
    def score(
        queries: ImageFeatures, exclude: Int64[np.ndarray, "q"]
    ) -> Float32[np.ndarray, "q n"]:
        found = neighbours(queries.vectors, gallery.vectors, CANDIDATES, exclude)[1]
        asked, offered = queries.local_features[scale], gallery.local_features[scale]
        scores = np.zeros((len(found), len(gallery.vectors)), np.float32)
        for i, rows in enumerate(found):
            candidates = jax.tree.map(lambda part, rows=rows: part[rows], offered)
            one = jax.tree.map(lambda part, i=i: part[i : i + 1], asked)
            scores[i, rows] = evidence(one, candidates, tolerance)
        return scores

    return score


def evidence(
    query: LocalFeatures, candidates: LocalFeatures, tolerance: float | None
) -> Float32[np.ndarray, "c"]:
    """How much the places of one query and of each candidate have in common.

    Sum of the weights of the matches (of the inliers, less the share of the three that fix a map),
    divided by the number of places: between 0 and 1.

    Args:
      query: one image.
      candidates: any number of images, with as many places each.
      tolerance: as `geometric_verification`; None takes matches wherever they lie.
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
    """Numbers in [0, 1) from which every hypothesis picks its three matches."""
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
    """Places that are each other's nearest; those without a direction match nothing.

    Args: single images, without the leading axis.
    """
    similarity = query.descriptor @ candidate.descriptor.T
    forth, back = jnp.argmax(similarity, axis=1), jnp.argmax(similarity, axis=0)
    best = jnp.maximum(jnp.max(similarity, axis=1), 0)
    weight = jnp.where(back[forth] == jnp.arange(len(forth)), best**SHARPNESS, 0)
    order = jnp.argsort(-weight, stable=True)
    return Matches(query.position[order], candidate.position[forth[order]], weight[order])


def consensus(
    matches: Matches, draw: Float[Array, "h 3"], tolerance: Float[Array, ""]
) -> Bool[Array, "m"]:
    """Inliers of the best hypothesis, or of the map fitted to them where those weigh more."""
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
    """Three different numbers below `count`, all triples equally likely; of no account when there
    are fewer than three."""
    picked = (draw * (count - jnp.arange(MINIMUM))).astype(jnp.int32)
    first = picked[0]
    second = picked[1] + (picked[1] >= first)  # steps over the one that is taken
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    third = picked[2] + (picked[2] >= low)
    return jnp.stack([first, second, third + (third >= high)])


def through(source: Float[Array, "3 2"], target: Float[Array, "3 2"]) -> Affine:
    """The map that takes three points to three others, in closed form; not sound where either three
    lie on a line."""
    before, after = (source[1:] - source[0]).T, (target[1:] - target[0]).T
    matrix, sound = _quotient(after, before, SMALLEST)
    sound &= jnp.abs(_determinant(after)) > SMALLEST
    return Affine(matrix, target[0] - matrix @ source[0], sound)


def fit(matches: Matches, chosen: Bool[Array, "m"]) -> Affine:
    """The map with the least weighted squared distance over the chosen matches."""
    weight = matches.weight * chosen
    share = weight / jnp.maximum(weight.sum(), 1e-12)
    source, target = share @ matches.source, share @ matches.target
    before, after = matches.source - source, matches.target - target
    spread = (before * share[:, None]).T @ before
    matrix, sound = _quotient((after * share[:, None]).T @ before, spread, SMALLEST**2)
    return Affine(matrix, target - matrix @ source, sound)


def inliers(affine: Affine, matches: Matches, tolerance: Float[Array, ""]) -> Bool[Array, "m"]:
    """Matches whose target lies where the map takes the source."""
    change = jnp.abs(_determinant(affine.matrix))
    likely = affine.sound & (change < LARGEST_CHANGE) & (change > 1 / LARGEST_CHANGE)
    gap = matches.source @ affine.matrix.T + affine.shift - matches.target
    near = jnp.sum(jnp.square(gap), axis=-1) <= tolerance**2
    return likely & near & (matches.weight > 0)


def _determinant(matrix: Float[Array, "2 2"]) -> Float[Array, ""]:
    return matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]


def _quotient(
    left: Float[Array, "2 2"], right: Float[Array, "2 2"], smallest: float
) -> tuple[Float[Array, "2 2"], Bool[Array, ""]]:
    """left times the inverse of right, and whether right has one."""
    area = _determinant(right)
    sound = jnp.abs(area) > smallest
    adjugate = jnp.array([[right[1, 1], -right[0, 1]], [-right[1, 0], right[0, 0]]])
    return left @ adjugate / jnp.where(sound, area, 1.0), sound
