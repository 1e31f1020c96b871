"""What re-ranking gains and costs: settings chosen on validation classes, measured on test classes.

Whitening is fitted on training classes and comes before a re-ranker; it is compared as a method of
its own, with the similarity itself as the ranking. So are descriptors of several scales.
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
from afa.evaluation.protocols import Protocol, drawn_evenly, halves, protocols
from afa.evaluation.statistics import Estimate
from afa.inference.embed import ONE_SIZE, Embedding, Pyramid
from afa.models.fusion import Role
from afa.retrieval.rerank import EVIDENCE, LOCAL_SCALES, METHODS, combinations, plain, word
from afa.retrieval.rerank.contract import (
    ImageFeatures,
    ImageReranker,
    ImageScorer,
    Scorer,
    of_vectors,
)
from afa.retrieval.rerank.whitening import Whitening, learned_whitening, pca_whitening

BLOCK = 256  # queries whose scores of the whole gallery are held
CHOSEN_BY = "map_at_r"
HALVES = "halves"
SHRINKAGE = (0.03, 0.1, 0.3)
SHARES = (0.25, 0.5, 1.0)  # of the dimensions that whitening keeps
LOCAL_FEATURES = 128  # of an image's local view that are kept
SCALES = ((1.0, 0.7), (1.0, 0.7, 0.5), (1.4, 1.0), (1.4, 1.0, 0.7))
POWERS = (1.0, 3.0)

DESCRIPTOR = "descriptor"
PLAIN, MULTI_SCALE = "plain", "multi-scale"
WHITENING = PCA, LEARNED = "PCA whitening", "learned whitening"
POSTERIOR, LOCAL = "class posterior", ("local matches", "geometric verification")
NAMES = (PLAIN, MULTI_SCALE, PCA, LEARNED, *(n for n in METHODS if n != PLAIN), *EVIDENCE)


@dataclass(frozen=True)
class Split:
    """The images of one split and what is known of them.

    Attributes:
      milliseconds: to describe an image as one of a batch: DESCRIPTOR for what every method needs,
        and every key of `known.local_features` and `known.multi_scale`.
      asked: the same of the images as queries, where that is something else (a gate that is not
        fixed, `afa.models.fusion`).
    """

    images: ImageSet
    known: ImageFeatures
    milliseconds: Mapping[Any, float] = field(default_factory=dict)
    asked: ImageFeatures | None = None

    def queries(self, index: np.ndarray) -> ImageFeatures:
        """What is known of the images at `index` as queries."""
        return (self.known if self.asked is None else self.asked).rows(index)


@dataclass(frozen=True)
class Line:
    """One method on the test classes.

    Attributes:
      settings: as chosen on validation classes.
      validation: MAP@R there.
      metrics: figures of the test queries.
      gain: MAP@R over the plain ranking, with the interval over classes.
      p: of the sign-flip test over classes.
      description: milliseconds to describe a query, as one of a batch.
      milliseconds: to score the gallery for a query, once the gallery is prepared.
      seconds: to prepare the gallery.
    """

    method: str
    settings: dict[str, Any]
    validation: float
    metrics: Metrics
    gain: Estimate
    p: float
    description: float
    milliseconds: float
    seconds: float


@dataclass(frozen=True)
class Candidate:
    """A method of the study.

    Attributes:
      settings: what is tried.
      weights: of evidence that is added to the similarity; none for a method of another kind.
      described: settings -> what of `Split.milliseconds` a query costs.
    """

    reranker: ImageReranker
    settings: Sequence[dict[str, Any]]
    weights: Sequence[float] = ()
    described: Callable[[Mapping[str, Any]], Sequence[Any]] = lambda settings: (DESCRIPTOR,)


def chosen(words: Sequence[str]) -> tuple[str, ...]:
    """The methods that are asked for, in the order of the study, the plain ranking first.

    Raises:
      UserError: there is no such method; the nearest is named.
    """
    table = {word(name): name for name in NAMES}
    wanted = {PLAIN, *(choose("methods", each, table) for each in words)}
    return tuple(name for name in NAMES if name in wanted)


# ---- what is known of the images -------------------------------------------------------------


def describe(
    embedding: Embedding,
    variables: PyTree,
    weights: Mapping[str, float],
    images: ImageSet,
    names: Sequence[str] = NAMES,
    scales: Sequence[float] = (1.0,),
) -> Split:
    """The descriptors that search uses, and what the named methods need beside them.

    Args:
      weights: of the blocks of a descriptor.
      scales: of the images behind the descriptors that all methods begin with
        (`Embedding.multi_scale`).
    """
    clock = _Clock(images)
    usual = tuple(scales) == (1.0,)
    roles: tuple[Role, ...] = ("query", "gallery") if embedding.networks.gated else ("query",)
    embed = [
        embedding.fused(weights, role)
        if usual
        else embedding.multi_scale(weights, scales, role=role)
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
    several = [{} for _ in roles]
    if MULTI_SCALE in names:
        several = _several(clock, embedding, variables, weights, roles)
    asked, *offered = (
        ImageFeatures(rows, posterior, local_features, scaled)
        for rows, scaled in zip(vectors, several, strict=True)
    )
    if not offered:
        return Split(images, asked, clock.milliseconds)
    return Split(images, offered[0], clock.milliseconds, asked)


class _Clock:
    """Milliseconds an image of what is described, compilation apart."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.milliseconds = images, {}

    def of(self, key: Any, function: Callable[[ImageSet], Any]) -> Any:
        function(self.images.subset(np.zeros(1, np.int64)))  # compiles
        began = time.perf_counter()
        found = function(self.images)
        self.milliseconds[key] = 1e3 * (time.perf_counter() - began) / len(self.images)
        return found


def _several(
    clock: _Clock,
    embedding: Embedding,
    variables: PyTree,
    weights: Mapping[str, float],
    roles: Sequence[Role],
) -> list[dict[Any, Float32[np.ndarray, "n d"]]]:
    """Descriptors of every choice of scales and power in every role, each scale seen once."""
    ours = tuple(name for name in weights if name not in ONE_SIZE)
    rest = tuple(name for name in weights if name in ONE_SIZE)
    parts = {}
    for scale in sorted({each for scales in SCALES for each in scales}):
        scaled = embedding.at(scale)
        key = "scale", scale
        parts[scale] = clock.of(key, lambda p, s=scaled: s.some(variables, p, ours))
    other = clock.of("rest", lambda p: embedding.some(variables, p, rest))
    pyramid = Pyramid(parts, other)
    found: list[dict[Any, Float32[np.ndarray, "n d"]]] = [{} for _ in roles]
    for scales, power in itertools.product(SCALES, POWERS):
        for role, vectors in zip(roles, found, strict=True):
            vectors[scales, power] = pyramid.fused(weights, scales, power, role)
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
    """Every method, the plain ranking first.

    Args:
      splits: validation, test, and for whitening train.
      protocol: of the test queries, in which no query is in the gallery: one that the split
        allows (`offered`). Settings are chosen by halves, which every split allows.
      note: is told what is done.
      names: the methods, of `NAMES`.
      queries: of either split, drawn evenly over the classes; 0 is all.
    """
    measured_on = splits["test"]
    rule = _asking(splits["validation"].images, HALVES, queries)
    target = _asking(measured_on.images, protocol, queries)
    labels = measured_on.images.labels[target.queries]
    lines: list[Line] = []
    table = _candidates(splits.get("train"))
    for name in names:
        candidate = table[name]
        count = len(candidate.settings) * max(1, len(candidate.weights))
        note(f"{name}: {count} settings")
        best, settings = choice(candidate, splits["validation"], rule)
        reranker = added(candidate.reranker) if candidate.weights else candidate.reranker
        metrics, seconds, each = measure(reranker, settings, measured_on, target)
        values = metrics.per_query[CHOSEN_BY]
        before = lines[0].metrics.per_query[CHOSEN_BY] if lines else values
        cost = measured_on.milliseconds
        lines.append(
            Line(
                name, settings, best, metrics,
                statistics.bootstrap(values - before, labels),
                statistics.sign_flip(values, before, labels),
                sum(cost.get(key, 0.0) for key in candidate.described(settings)),
                1e3 * each, seconds,
            )
        )  # fmt: skip
    return lines


def offered(images: ImageSet) -> list[str]:
    """Protocols by which re-ranking is measured, the headline first.

    Methods that prepare the gallery use the neighbours of its images. Leave-one-out, where the
    query is one of them, would let it change its own result: halves take its place.
    """
    found = [each.name for each in protocols(images) if each.name != "leave_one_out"]
    return sorted({HALVES, *found}, key=("query_gallery", HALVES, "catalogue").index)


def _asking(images: ImageSet, name: str, count: int) -> Protocol:
    """The protocol with some of its queries."""
    whole = halves(images) if name == HALVES else protocols(images, name)[0]
    drawn = drawn_evenly(images, whole.queries, count, seed=0)
    place = np.searchsorted(whole.queries, drawn)
    return dataclasses.replace(whole, queries=drawn, exclude=whole.exclude[place])


def choice(candidate: Candidate, split: Split, protocol: Protocol) -> tuple[float, dict[str, Any]]:
    """The best of a method's settings by MAP@R, and that figure; the first of equals."""
    tried: list[tuple[float, dict[str, Any]]] = []
    for settings in candidate.settings:
        if not candidate.weights:
            metrics = measure(candidate.reranker, settings, split, protocol)[0]
            tried.append((metrics.means[CHOSEN_BY], settings))
            continue
        # Evidence is dear and its weight is not: it is asked for once.
        similarity = _scores(of_vectors(plain), {}, split, protocol)
        evidence = _scores(candidate.reranker, settings, split, protocol)
        for weight in candidate.weights:
            found = metrics_of(_ranked(similarity + weight * evidence, split, protocol))
            tried.append((found.means[CHOSEN_BY], settings | {"weight": weight}))
    return max(tried, key=lambda each: each[0])


def measure(
    reranker: ImageReranker, settings: Mapping[str, Any], split: Split, protocol: Protocol
) -> tuple[Metrics, float, float]:
    """Figures of a re-ranker, seconds to prepare the gallery, and seconds a query."""
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


def added(evidence: ImageReranker) -> ImageReranker:
    """Evidence as a re-ranker: what it gives, times `weight`, is added to the similarity."""

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
    """Where the positives stand; `rows` are the queries that the scores are of."""
    labels = split.images.labels
    positives = labels[protocol.queries[rows], None] == labels[protocol.gallery]
    junk = protocol.exclude[rows, None] == np.arange(len(protocol.gallery))
    return Ranked.from_scores(scores, positives, junk)


def _candidates(train: Split | None) -> dict[str, Candidate]:
    """All methods by name; whitening is fitted on the training classes, and left out without."""
    table = {
        MULTI_SCALE: Candidate(
            multi_scale,
            combinations({"scales": SCALES, "power": POWERS}),
            described=lambda settings: [(settings["scales"], settings["power"])],
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
    """The similarity of descriptors of several scales."""
    place = gallery.multi_scale[scales, power]
    return lambda queries, exclude: queries.multi_scale[scales, power] @ place.T


def _whitened(fit: Callable[[int, float], Whitening]) -> ImageReranker:
    def rerank(gallery: np.ndarray, *, dimension: int, shrinkage: float) -> Scorer:
        turn = fit(dimension, shrinkage)
        place = turn(gallery)
        return lambda queries, exclude: turn(queries) @ place.T

    return of_vectors(rerank)
