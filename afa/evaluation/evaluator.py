"""Evaluation of a run: validation during training, and the table of test classes at its end.

Every figure comes from exact search. Weights are chosen on validation classes, with clean queries
and the trained corruptions; the test classes and the held-back corruptions are seen once, after
every choice.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import PyTree

from afa.config import ExperimentConfig
from afa.data.corruptions import CORRUPTIONS, held_back
from afa.data.pipeline import Corruption
from afa.data.types import Dataset, ImageSet
from afa.evaluation.metrics import extra
from afa.evaluation.metrics.retrieval import Metrics, metrics_from_ranks
from afa.evaluation.protocols import Protocol, drawn_evenly, protocols
from afa.evaluation.variants import Score, Variant, Weights, build_variants, costs
from afa.inference.embed import DescriptorBlocks, Embedding, pixels
from afa.models.embedder import FUSED
from afa.models.networks import Networks
from afa.retrieval.exact import positive_ranks

CHOICE_SEVERITY = 3  # of the trained corruptions when weights are chosen
SHORT = ("recall_at_1", "map_at_r")  # what is kept of every single corruption and severity
# Validation of a trained G: the fused descriptor that the metric loss trains, and G's view.
WITH_GENERATOR = FUSED | {"restored": 1.0}
EXTRA_VARIANTS = ("F", "fused")  # what a run is about, and what it is measured against

Describe = Callable[[ImageSet, Corruption | None], DescriptorBlocks]


@dataclass
class Results:
    """What an evaluation found.

    Attributes:
      variants: variant -> {"cost", "weights", protocol -> {"clean", "trained", "held_back",
        "corruptions": {name: {severity: figures}}, and for some variants "extra"
        (`afa.evaluation.metrics.extra`)}}.
      per_query: columns of equal length, one entry a query, variant, protocol and corruption.
    """

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_query: dict[str, list[Any]] = field(default_factory=dict)


def ranked_metrics(
    queries: np.ndarray, gallery: np.ndarray, images: ImageSet, protocol: Protocol,
    chosen: np.ndarray | None = None,
) -> Metrics:  # fmt: skip
    """Figures of some of a protocol's queries (positions `chosen`; default all).

    Args:
      queries: unit vectors of those queries.
      gallery: unit vectors of the protocol's gallery.
    """
    return metrics_from_ranks(ranks_of(queries, gallery, images, protocol, chosen))


def ranks_of(
    queries: np.ndarray, gallery: np.ndarray, images: ImageSet, protocol: Protocol,
    chosen: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """The rank of every positive of those queries (`afa.retrieval.exact.positive_ranks`)."""
    chosen = np.arange(len(protocol.queries)) if chosen is None else chosen
    ranks = positive_ranks(
        queries,
        gallery,
        images.labels[protocol.queries[chosen]],
        images.labels[protocol.gallery],
        protocol.exclude[chosen],
    )
    return np.asarray(ranks)


class Evaluator:
    """Evaluates the states of one run."""

    def __init__(self, networks: Networks, config: ExperimentConfig, dataset: Dataset) -> None:
        self.networks, self.config, self.dataset = networks, config, dataset
        self.embedding = Embedding(networks, config)

    def validation(self, variables: PyTree, generator: bool = False) -> dict[str, float]:
        """R@1 and MAP@R of validation classes, leave-one-out, clean queries: of the global view,
        and of what a search fuses; "map_at_r" is the latter, by which checkpoints are kept.

        Args:
          generator: G has been trained, so G's view is fused too, beside the global and the local
            one.
        """
        images = self.dataset.validation
        count = self.config.evaluation.validation_queries
        wild = self._drawn(images, np.flatnonzero(~images.catalogue), count)
        images = images.subset(wild)
        if generator:
            described = self.embedding.some(variables, images, tuple(WITH_GENERATOR))
            joined = described.fused(WITH_GENERATOR)
        else:
            described = self.embedding.plain(variables, images)
            joined = described.blocks["fused"]
        protocol = protocols(images, "leave_one_out")[0]

        def figures(rows: np.ndarray) -> Mapping[str, float]:
            return ranked_metrics(rows, rows, images, protocol).means

        alone, fused = figures(described.blocks["global"]), figures(joined)
        return {
            "recall_at_1": fused["recall_at_1"],
            "map_at_r": fused["map_at_r"],
            "global_recall_at_1": alone["recall_at_1"],
            "global_map_at_r": alone["map_at_r"],
        }

    def variants(self, variables: PyTree, initial: PyTree) -> list[Variant]:
        """The variants of the table, with weights chosen on validation classes.

        Args:
          variables: of the trained networks.
          initial: of the embedder before training.
        """
        blocks = ("global", "local", *self.networks.view_names)
        return build_variants(
            self.networks,
            self._scored(lambda s, c: self.embedding.blocks(variables, s, c)),
            self._scored(lambda s, c: self.embedding.pooled(initial, s, blocks, c)),
            costs(self.networks, variables, self.config),
        )

    def _scored(self, describe: Describe) -> Score:
        """Fusion weights -> MAP@R on validation classes, mean of clean queries and of the trained
        corruptions."""
        images, config = self.dataset.validation, self.config.evaluation
        protocol = protocols(images, "leave_one_out")[0]
        gallery = describe(images.subset(protocol.gallery), None)
        drawn = self._drawn(images, protocol.queries, config.corruption_queries)
        at = np.searchsorted(protocol.queries, drawn)
        trained = [(name, CHOICE_SEVERITY) for name in self.config.data.corruptions]
        conditions = [gallery.rows(at), *(describe(images.subset(drawn), c) for c in trained)]

        def score(weights: Weights) -> float:
            vectors = gallery.fused(weights, "gallery")
            found = [
                ranked_metrics(each.fused(weights), vectors, images, protocol, at)
                for each in conditions
            ]
            return float(np.mean([metrics.means["map_at_r"] for metrics in found]))

        return score

    def _drawn(self, images: ImageSet, index: np.ndarray, count: int) -> np.ndarray:
        """The same images for every seed of a run: runs are compared query by query."""
        return drawn_evenly(images, index, count, self.config.evaluation.corruption_seed)

    def test(
        self,
        variables: PyTree,
        initial: PyTree,
        variants: Sequence[Variant],
        note: Callable[[str], None],
    ) -> Results:
        """Every variant on the test classes: clean queries, then every corruption and severity."""
        images, config, results = self.dataset.test, self.config, Results()
        listed = protocols(images, config.evaluation.protocol)
        describe = self._sources(variables, initial, variants)
        clean = {source: function(images, None) for source, function in describe.items()}
        galleries = {
            (v.name, p.name): clean[v.source].rows(p.gallery).fused(v.weights, "gallery")
            for v in variants
            for p in listed
        }
        for v in variants:
            results.variants[v.name] = {"cost": v.cost, "weights": v.weights}
            for p in listed:
                queries = clean[v.source].rows(p.queries).fused(v.weights)
                results.variants[v.name][p.name] = self._clean(
                    v.name, queries, galleries[v.name, p.name], p, results
                )
        asked = listed[0].queries  # every protocol of a split has the same queries
        drawn = self._drawn(images, asked, config.evaluation.corruption_queries)
        at = np.searchsorted(asked, drawn)
        for name in CORRUPTIONS:
            for severity in config.evaluation.severities:
                corrupted = {
                    source: function(images.subset(drawn), (name, severity))
                    for source, function in describe.items()
                }
                for v, p in itertools.product(variants, listed):
                    queries = corrupted[v.source].fused(v.weights)
                    metrics = ranked_metrics(queries, galleries[v.name, p.name], images, p, at)
                    kept = results.variants[v.name][p.name]["corruptions"].setdefault(name, {})
                    kept[str(severity)] = {each: metrics.means[each] for each in SHORT}
                    _record(results, v.name, p, images, drawn, name, severity, metrics)
            note(f"evaluated {name} on {len(drawn)} queries")
        _add_means(results, config)
        return results

    def _sources(
        self, variables: PyTree, initial: PyTree, variants: Sequence[Variant]
    ) -> dict[str, Describe]:
        """The functions from images to descriptor blocks that the variants need."""
        blocks = {b: None for v in variants if v.source == "initial" for b in v.weights}
        every: dict[str, Describe] = {
            "trained": lambda s, c: self.embedding.blocks(variables, s, c),
            "initial": lambda s, c: self.embedding.pooled(initial, s, tuple(blocks), c),
            "pixels": lambda s, c: pixels(s, self.config, c),
        }
        used = {v.source for v in variants}
        return {source: function for source, function in every.items() if source in used}

    def _clean(
        self, name: str, queries: np.ndarray, gallery: np.ndarray, p: Protocol, results: Results
    ) -> dict[str, Any]:
        """Figures of a variant's clean queries under one protocol."""
        images = self.dataset.test
        ranks = ranks_of(queries, gallery, images, p)
        metrics = metrics_from_ranks(ranks)
        _record(results, name, p, images, p.queries, "", 0, metrics)
        found: dict[str, Any] = {"clean": metrics.means, "corruptions": {}}
        if name in EXTRA_VARIANTS:
            found["extra"] = extra.figures(queries, gallery, ranks, images, p, self.config.seed)
        return found


def _record(
    results: Results, variant: str, protocol: Protocol, images: ImageSet, index: np.ndarray,
    corruption: str, severity: int, metrics: Metrics,
) -> None:  # fmt: skip
    """Appends one line a query to the per-query table."""
    count = len(index)
    columns: dict[str, Iterable[Any]] = {
        "variant": [variant] * count,
        "protocol": [protocol.name] * count,
        "corruption": [corruption] * count,
        "severity": [severity] * count,
        "query": [images.ids[i] for i in index],
        "label": images.labels[index].tolist(),
        **{name: values.tolist() for name, values in metrics.per_query.items()},
    }
    for name, values in columns.items():
        results.per_query.setdefault(name, []).extend(values)


def _add_means(results: Results, config: ExperimentConfig) -> None:
    """Means over the trained and over the held-back corruptions, all severities alike."""
    groups = {
        "trained": config.data.corruptions,
        "held_back": held_back(config.data.corruptions),
    }
    for variant in results.variants.values():
        for figures in (each for each in variant.values() if isinstance(each, dict)):
            if "corruptions" not in figures:
                continue
            for group, names in groups.items():
                found = [f for n in names for f in figures["corruptions"][n].values()]
                figures[group] = {
                    name: float(np.mean([each[name] for each in found])) for name in SHORT if found
                }
