"""What re-ranking gains and costs: settings chosen on validation classes, measured on test classes.

Whitening is fitted on training classes and comes before a re-ranker; it is compared as a method of
its own, with the similarity itself as the ranking.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from afa.data.types import ImageSet
from afa.evaluation import statistics
from afa.evaluation.metrics import Metrics, Ranked, metrics_of, pad
from afa.evaluation.protocols import Protocol, protocols
from afa.evaluation.statistics import Estimate
from afa.retrieval.rerank import METHODS, Method
from afa.retrieval.rerank.contract import Reranker, Scorer
from afa.retrieval.rerank.whitening import learned_whitening, pca_whitening

BLOCK = 256  # queries whose scores of the whole gallery are held
CHOSEN_BY = "map_at_r"
SHRINKAGE = (0.03, 0.1, 0.3)
SHARES = (0.25, 0.5, 1.0)  # of the dimensions that whitening keeps


@dataclass(frozen=True)
class Split:
    """The pictures of one split and their descriptors."""

    images: ImageSet
    vectors: Float32[np.ndarray, "n d"]


@dataclass(frozen=True)
class Line:
    """One method on the test classes.

    Attributes:
      settings: as chosen on validation classes.
      validation: MAP@R there.
      metrics: figures of the test queries.
      gain: MAP@R over the plain ranking, with the interval over classes.
      p: of the sign-flip test over classes.
      milliseconds: of one query, once the gallery is prepared.
      seconds: to prepare the gallery.
    """

    method: str
    settings: dict[str, Any]
    validation: float
    metrics: Metrics
    gain: Estimate
    p: float
    milliseconds: float
    seconds: float


def study(splits: Mapping[str, Split], protocol: str, note: Callable[[str], None]) -> list[Line]:
    """Every method, the plain ranking first.

    Args:
      splits: train, validation and test.
      protocol: of the test queries, "leave_one_out" or "catalogue"; settings are chosen by
        leave-one-out, which every split allows.
      note: is told what is done.
    """
    chosen_on, measured_on = splits["validation"], splits["test"]
    rule = protocols(chosen_on.images, "leave_one_out")[0]
    target = protocols(measured_on.images, protocol)[0]
    labels = measured_on.images.labels[target.queries]
    lines: list[Line] = []
    for name, method in _methods(splits["train"]).items():
        note(f"{name}: {len(method.settings())} settings")
        tried = [
            (measure(method.reranker, one, chosen_on, rule)[0].means[CHOSEN_BY], one)
            for one in method.settings()
        ]
        best, settings = max(tried, key=lambda each: each[0])
        metrics, seconds, each = measure(method.reranker, settings, measured_on, target)
        values = metrics.per_query[CHOSEN_BY]
        before = lines[0].metrics.per_query[CHOSEN_BY] if lines else values
        lines.append(
            Line(
                name, settings, best, metrics,
                statistics.bootstrap(values - before, labels),
                statistics.sign_flip(values, before, labels),
                1e3 * each, seconds,
            )
        )  # fmt: skip
    return lines


def measure(
    reranker: Reranker, settings: Mapping[str, Any], split: Split, protocol: Protocol
) -> tuple[Metrics, float, float]:
    """Figures of a re-ranker, seconds to prepare the gallery, and seconds a query."""
    gallery, queries = split.vectors[protocol.gallery], split.vectors[protocol.queries]
    labels = split.images.labels
    wanted, offered = labels[protocol.queries], labels[protocol.gallery]
    began = time.perf_counter()
    score = reranker(gallery, **settings)
    prepared = time.perf_counter() - began
    spent, ranks, relevant = 0.0, [], []
    for begin in range(0, len(queries), BLOCK):
        rows = slice(begin, begin + BLOCK)
        began = time.perf_counter()
        scores = score(queries[rows], protocol.exclude[rows])
        spent += time.perf_counter() - began
        junk = protocol.exclude[rows, None] == np.arange(len(gallery))
        ranked = Ranked.from_scores(scores, wanted[rows, None] == offered, junk)
        ranks.extend(line[line >= 0] for line in ranked.ranks)
        relevant.append(ranked.relevant)
    found = metrics_of(Ranked(pad(ranks), np.concatenate(relevant)))
    return found, prepared, spent / len(queries)


def _methods(train: Split) -> dict[str, Method]:
    """The table of re-rankers, and whitening fitted on the training classes."""
    dimension = train.vectors.shape[1]
    kept = tuple(max(1, round(share * dimension)) for share in SHARES)
    grid = {"dimension": kept, "shrinkage": SHRINKAGE}
    fits: dict[str, Callable[[int, float], Any]] = {
        "PCA whitening": functools.cache(functools.partial(pca_whitening, train.vectors)),
        "learned whitening": functools.cache(
            functools.partial(learned_whitening, train.vectors, train.images.labels)
        ),
    }

    def whitened(fit: Callable[[int, float], Any]) -> Reranker:
        def rerank(gallery: np.ndarray, *, dimension: int, shrinkage: float) -> Scorer:
            turn = fit(dimension, shrinkage)
            place = turn(gallery)
            return lambda queries, exclude: turn(queries) @ place.T

        return rerank

    whitenings = {name: Method(whitened(fit), grid) for name, fit in fits.items()}
    (first, plain), *rest = METHODS.items()
    return dict(itertools.chain([(first, plain)], whitenings.items(), rest))
