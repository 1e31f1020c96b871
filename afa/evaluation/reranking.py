"""Compares re-ranking methods: settings are chosen on validation, metrics are of test classes.

Whitening (fitted on training classes) and multi-scale descriptors change the descriptors instead of
the ranking; they are compared as methods of their own, ranked by cosine similarity.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, PyTree

from afa.data.types import ImageSet
from afa.errors import choose
from afa.evaluation import statistics
from afa.evaluation.metrics.retrieval import Metrics, Ranked, metrics_of, pad
from afa.evaluation.protocols import Protocol, drawn_evenly, protocols, supported
from afa.evaluation.statistics import Estimate
from afa.inference.embed import ONE_SIZE, Embedding, Pyramid
from afa.models.fusion import Fusion, Role
from afa.retrieval.rerank import EVIDENCE, LOCAL_SCALES, METHODS, combinations, plain, word
from afa.retrieval.rerank.contract import (
    ImageFeatures,
    ImageReranker,
    ImageScorer,
    Scorer,
    of_vectors,
)
from afa.retrieval.rerank.whitening import Whitening, learned_whitening, pca_whitening

BLOCK = 256  # queries whose scores for the whole gallery are in memory at a time
CHOSEN_BY = "map_at_r"
HALVES = "halves"
SHRINKAGE = (0.03, 0.1, 0.3)
SHARES = (0.25, 0.5, 1.0)  # shares of the dimensions that whitening keeps
LOCAL_FEATURES = 128  # local features per image
SCALES = ((1.0, 0.7), (1.0, 0.7, 0.5), (1.4, 1.0), (1.4, 1.0, 0.7))
POWERS = (1.0, 3.0)

DESCRIPTOR = "descriptor"
PLAIN, MULTI_SCALE = "plain", "multi-scale"
WHITENING = PCA, LEARNED = "PCA whitening", "learned whitening"
POSTERIOR, LOCAL = "class posterior", ("local matches", "geometric verification")
NAMES = (PLAIN, MULTI_SCALE, PCA, LEARNED, *(n for n in METHODS if n != PLAIN), *EVIDENCE)


@dataclass(frozen=True)
class Split:
    """The images of one split with their features.

    Attributes:
      images: the images.
      known: their features.
      milliseconds: time to embed one image of a batch: DESCRIPTOR for the descriptor that every
        method needs, and one entry per key of `known.local_features` and `known.multi_scale`.
      query_features: their features as queries, if they differ (a route of queries,
        `afa.models.routing`); else None.
    """

    images: ImageSet
    known: ImageFeatures
    milliseconds: Mapping[Any, float] = field(default_factory=dict)
    query_features: ImageFeatures | None = None

    def queries(self, index: np.ndarray) -> ImageFeatures:
        """Features of the images at `index` as queries."""
        return (self.known if self.query_features is None else self.query_features).rows(index)


@dataclass(frozen=True)
class Line:
    """Result of one method on the test classes.

    Attributes:
      method: its name.
      settings: settings chosen on validation classes.
      validation: MAP@R on validation classes.
      metrics: metrics of the test queries.
      gain: gain in MAP@R over the plain ranking, with the interval over classes.
      p: p-value of the sign-flip test over classes.
      embed_milliseconds: time to embed one query of a batch.
      milliseconds: time to score the gallery for one query, after `seconds`.
      seconds: time to prepare the gallery.
    """

    method: str
    settings: dict[str, Any]
    validation: float
    metrics: Metrics
    gain: Estimate
    p: float
    embed_milliseconds: float
    milliseconds: float
    seconds: float


@dataclass(frozen=True)
class Candidate:
    """A method of the study.

    Attributes:
      reranker: the method.
      settings: settings to try.
      weights: weights to try, for a method whose scores are added to the similarity; else empty.
      costs: settings -> the keys of `Split.milliseconds` that a query needs.
    """

    reranker: ImageReranker
    settings: Sequence[dict[str, Any]]
    weights: Sequence[float] = ()
    costs: Callable[[Mapping[str, Any]], Sequence[Any]] = lambda settings: (DESCRIPTOR,)


def chosen(words: Sequence[str]) -> tuple[str, ...]:
    """Returns the named methods in the order of the study, the plain ranking first.

    Args:
      words: names as typed, such as "k_reciprocal".

    Raises:
      UserError: there is no such method; the nearest name is given.
    """
    table = {word(name): name for name in NAMES}
    wanted = {PLAIN, *(choose("methods", each, table) for each in words)}
    return tuple(name for name in NAMES if name in wanted)


# ---- features of the images --------------------------------------------------------------------


def embed_split(
    embedding: Embedding,
    variables: PyTree,
    fusion: Fusion,
    images: ImageSet,
    names: Sequence[str] = NAMES,
    scales: Sequence[float] = (1.0,),
) -> Split:
    """Computes the descriptors of a split and the extra features that the named methods need.

    Args:
      embedding: predict functions of the run.
      variables: variables of its networks.
      fusion: how an image becomes a vector; at several scales, queries are not routed.
      images: the split.
      names: methods, from `NAMES`.
      scales: image scales of the descriptors that all methods start from
        (`Embedding.multi_scale`).
    """
    clock = _Clock(images)
    single = tuple(scales) == (1.0,)
    routed = fusion.route is not None and single
    roles: tuple[Role, ...] = ("query", "gallery") if routed else ("query",)
    embed = [
        embedding.fused(fusion, role) if single else embedding.multi_scale(fusion, scales)
        for role in roles
    ]
    vectors = [clock.of(DESCRIPTOR, lambda part: embed[0](variables, part))]
    vectors += [each(variables, images) for each in embed[1:]]
    posterior = np.zeros((len(images), 0), np.float32)
    if POSTERIOR in names:
        unit = embedding.some(variables, images, ("posterior",)).blocks["posterior"]
        posterior = unit / unit.sum(axis=1, keepdims=True)
    local_features = {}
    for scale in LOCAL_SCALES if set(LOCAL) & set(names) else ():
        scaled = embedding.at(scale)
        local_features[scale] = clock.of(
            scale, lambda p, s=scaled: s.local_features(variables, p, LOCAL_FEATURES)
        )
    multi = [{} for _ in roles]
    if MULTI_SCALE in names:
        multi = [_multi_scale_vectors(clock, embedding, variables, fusion)] * len(roles)
    as_query, *as_gallery = (
        ImageFeatures(rows, posterior, local_features, scaled)
        for rows, scaled in zip(vectors, multi, strict=True)
    )
    if not as_gallery:
        return Split(images, as_query, clock.milliseconds)
    return Split(images, as_gallery[0], clock.milliseconds, as_query)


class _Clock:
    """Measures the milliseconds per image of embedding functions, without compilation."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.milliseconds = images, {}

    def of(self, key: Any, function: Callable[[ImageSet], Any]) -> Any:
        function(self.images.subset(np.zeros(1, np.int64)))  # compiles
        began = time.perf_counter()
        found = function(self.images)
        self.milliseconds[key] = 1e3 * (time.perf_counter() - began) / len(self.images)
        return found


def _multi_scale_vectors(
    clock: _Clock, embedding: Embedding, variables: PyTree, fusion: Fusion
) -> dict[Any, Float32[np.ndarray, "n d"]]:
    """(scales, power) -> descriptors; each scale is embedded once."""
    scaled_blocks = tuple(name for name in fusion.blocks if name not in ONE_SIZE)
    fixed_blocks = tuple(name for name in fusion.blocks if name in ONE_SIZE)
    parts = {}
    for scale in sorted({each for scales in SCALES for each in scales}):
        scaled = embedding.at(scale)
        key = "scale", scale
        parts[scale] = clock.of(key, lambda p, s=scaled: s.some(variables, p, scaled_blocks))
    rest = clock.of("rest", lambda p: embedding.some(variables, p, fixed_blocks))
    pyramid, found = Pyramid(parts, rest), {}
    for scales, power in itertools.product(SCALES, POWERS):
        found[scales, power] = pyramid.fused(fusion, scales, power)
        keys = ["rest", *(("scale", each) for each in scales)]
        clock.milliseconds[scales, power] = sum(clock.milliseconds[key] for key in keys)
    return found


# ---- the study ---------------------------------------------------------------------------------


def study(
    splits: Mapping[str, Split],
    protocol: str,
    note: Callable[[str], None],
    names: Sequence[str] = NAMES,
    queries: int = 0,
) -> list[Line]:
    """Chooses the settings of every method on validation classes and measures it on test classes.

    Args:
      splits: "validation", "test", and for whitening "train".
      protocol: protocol of the test queries, in which no query is in the gallery: one of
        `supported_protocols`. Settings are chosen with halves, which every split supports.
      note: receives one line of progress per method.
      names: methods, from `NAMES`.
      queries: number of queries of each split, drawn evenly over the classes; 0 for all.

    Returns:
      One result per method, the plain ranking first.
    """
    test = splits["test"]
    validation_protocol = _with_queries(splits["validation"].images, HALVES, queries)
    test_protocol = _with_queries(test.images, protocol, queries)
    labels = test.images.labels[test_protocol.queries]
    lines: list[Line] = []
    table = _candidates(splits.get("train"))
    for name in names:
        candidate = table[name]
        count = len(candidate.settings) * max(1, len(candidate.weights))
        note(f"{name}: {count} settings")
        best, settings = choice(candidate, splits["validation"], validation_protocol)
        reranker = candidate.reranker
        if candidate.weights:
            reranker = added_to_similarity(reranker)
        metrics, seconds, seconds_a_query = measure(reranker, settings, test, test_protocol)
        values = metrics.per_query[CHOSEN_BY]
        plain_values = lines[0].metrics.per_query[CHOSEN_BY] if lines else values
        lines.append(
            Line(
                name, settings, best, metrics,
                statistics.bootstrap(values - plain_values, labels),
                statistics.sign_flip(values, plain_values, labels),
                sum(test.milliseconds.get(key, 0.0) for key in candidate.costs(settings)),
                1e3 * seconds_a_query, seconds,
            )
        )  # fmt: skip
    return lines


def supported_protocols(images: ImageSet) -> list[str]:
    """Returns the protocols of a split that re-ranking can be measured with, the main one first.

    Methods that prepare the gallery use the neighbours of its images. With leave-one-out the query
    is one of them and would change its own result, so halves replace it.
    """
    return [each.name for each in supported(images) if (each.exclude < 0).all()]


def _with_queries(images: ImageSet, name: str, count: int) -> Protocol:
    """The protocol with `count` of its queries (0: all)."""
    full = protocols(images, name)[0]
    drawn = drawn_evenly(images, full.queries, count, seed=0)
    at = np.searchsorted(full.queries, drawn)
    return dataclasses.replace(full, queries=drawn, exclude=full.exclude[at])


def choice(candidate: Candidate, split: Split, protocol: Protocol) -> tuple[float, dict[str, Any]]:
    """Returns the best MAP@R of a method and its settings; the first of equals."""
    tried: list[tuple[float, dict[str, Any]]] = []
    for settings in candidate.settings:
        if not candidate.weights:
            metrics = measure(candidate.reranker, settings, split, protocol)[0]
            tried.append((metrics.means[CHOSEN_BY], settings))
            continue
        # Computing the evidence is slow and weighting it is fast, so it is computed once.
        similarity = _scores(of_vectors(plain), {}, split, protocol)
        evidence = _scores(candidate.reranker, settings, split, protocol)
        for weight in candidate.weights:
            found = metrics_of(_ranked(similarity + weight * evidence, split, protocol))
            tried.append((found.means[CHOSEN_BY], settings | {"weight": weight}))
    return max(tried, key=lambda each: each[0])


def measure(
    reranker: ImageReranker, settings: Mapping[str, Any], split: Split, protocol: Protocol
) -> tuple[Metrics, float, float]:
    """Measures a re-ranker.

    Returns:
      Metrics, seconds to prepare the gallery, and seconds per query.
    """
    began = time.perf_counter()
    score = reranker(split.known.rows(protocol.gallery), **settings)
    prepared = time.perf_counter() - began
    spent, ranks, relevant = 0.0, [], []
    for rows, queries, exclude in _blocks(split, protocol):
        began = time.perf_counter()
        scores = score(queries, exclude)
        spent += time.perf_counter() - began
        ranked = _ranked(scores, split, protocol, rows)
        ranks.extend(line[line >= 0] for line in ranked.ranks)
        relevant.append(ranked.relevant)
    found = metrics_of(Ranked(pad(ranks), np.concatenate(relevant)))
    return found, prepared, spent / len(protocol.queries)


def added_to_similarity(evidence: ImageReranker) -> ImageReranker:
    """Returns a re-ranker whose score is the similarity plus `weight` times the evidence."""

    def rerank(gallery: ImageFeatures, *, weight: float, **settings: Any) -> ImageScorer:
        score = evidence(gallery, **settings)
        return lambda queries, exclude: (
            queries.vectors @ gallery.vectors.T + np.float32(weight) * score(queries, exclude)
        )

    return rerank


def _blocks(split: Split, protocol: Protocol) -> Iterator[tuple[slice, ImageFeatures, np.ndarray]]:
    for begin in range(0, len(protocol.queries), BLOCK):
        rows = slice(begin, begin + BLOCK)
        yield rows, split.queries(protocol.queries[rows]), protocol.exclude[rows]


def _scores(
    reranker: ImageReranker, settings: Mapping[str, Any], split: Split, protocol: Protocol
) -> Float32[np.ndarray, "q n"]:
    score = reranker(split.known.rows(protocol.gallery), **settings)
    return np.concatenate(
        [score(queries, exclude) for _, queries, exclude in _blocks(split, protocol)]
    )


def _ranked(
    scores: np.ndarray, split: Split, protocol: Protocol, rows: slice = slice(None)
) -> Ranked:
    """Ranks of the positives; `rows` are the queries of the scores."""
    labels = split.images.labels
    positives = labels[protocol.queries[rows], None] == labels[protocol.gallery]
    junk = protocol.exclude[rows, None] == np.arange(len(protocol.gallery))
    return Ranked.from_scores(scores, positives, junk)


def _candidates(train: Split | None) -> dict[str, Candidate]:
    """All methods by name; whitening needs the training split and is left out without it."""
    table = {
        MULTI_SCALE: Candidate(
            multi_scale,
            combinations({"scales": SCALES, "power": POWERS}),
            costs=lambda settings: [(settings["scales"], settings["power"])],
        )
    }
    if train is not None:
        table |= _whitenings(train)
    table |= {name: Candidate(of_vectors(m.reranker), m.settings()) for name, m in METHODS.items()}
    for name, method in EVIDENCE.items():
        table[name] = Candidate(
            method.reranker,
            method.settings(),
            method.weights,
            lambda settings: [DESCRIPTOR, *([settings["scale"]] if "scale" in settings else [])],
        )
    return table


def _whitenings(train: Split) -> dict[str, Candidate]:
    vectors = train.known.vectors
    fits = {
        PCA: functools.partial(pca_whitening, vectors),
        LEARNED: functools.partial(learned_whitening, vectors, train.images.labels),
    }
    kept = tuple(max(1, round(share * vectors.shape[1])) for share in SHARES)
    tried = combinations({"dimension": kept, "shrinkage": SHRINKAGE})
    return {name: Candidate(_whitened(functools.cache(fit)), tried) for name, fit in fits.items()}


def multi_scale(gallery: ImageFeatures, *, scales: tuple[float, ...], power: float) -> ImageScorer:
    """Ranks by the cosine similarity of multi-scale descriptors.

    Args:
      gallery: features with `multi_scale` descriptors.
      scales: image scales.
      power: exponent of the mean over scales (`afa.inference.embed.Pyramid.fused`).
    """
    gallery_vectors = gallery.multi_scale[scales, power]
    return lambda queries, exclude: queries.multi_scale[scales, power] @ gallery_vectors.T


def _whitened(fit: Callable[[int, float], Whitening]) -> ImageReranker:
    def rerank(gallery: np.ndarray, *, dimension: int, shrinkage: float) -> Scorer:
        whiten = fit(dimension, shrinkage)
        gallery_vectors = whiten(gallery)
        return lambda queries, exclude: whiten(queries) @ gallery_vectors.T

    return of_vectors(rerank)
