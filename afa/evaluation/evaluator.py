"""Evaluates a run: validation during training, and the result table of the test classes.

Every metric comes from exact search. Fusion weights are chosen on validation classes, with clean
queries and the trained corruptions. Test classes and held-back corruptions are used once, after all
choices are made.
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
from afa.evaluation.variants import Offset, Score, Variant, build_variants, costs
from afa.inference.embed import DescriptorBlocks, Embedding, pixels
from afa.models.embedder import FUSED
from afa.models.fusion import Fusion
from afa.models.networks import Networks
from afa.models.routing import ORIGINAL
from afa.retrieval.exact import positive_ranks

CHOICE_SEVERITY = 3  # severity of the trained corruptions when fusion weights are chosen
SHORT = ("recall_at_1", "map_at_r")  # metrics stored for each corruption and severity
# Blocks of the fused descriptor in validation once G is trained, with their weights.
WITH_GENERATOR = Fusion.of(FUSED | {"restored": 1.0})
EXTRA_VARIANTS = ("F", "fused")  # variants that also get the extra metrics

Embed = Callable[[ImageSet, Corruption | None], DescriptorBlocks]


@dataclass
class Results:
    """Results of an evaluation.

    Attributes:
      variants: variant -> {"cost", "fusion", protocol -> {"clean", "trained", "held_back",
        "corruptions": {name: {severity: metrics}}, and for `EXTRA_VARIANTS` "extra"
        (`afa.evaluation.metrics.extra`)}}.
      per_query: columns of equal length, one entry per query, variant, protocol, corruption and
        severity.
    """

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_query: dict[str, list[Any]] = field(default_factory=dict)


def ranked_metrics(
    queries: np.ndarray, gallery: np.ndarray, images: ImageSet, protocol: Protocol,
    chosen: np.ndarray | None = None,
) -> Metrics:  # fmt: skip
    """Computes the retrieval metrics of a protocol.

    Args:
      queries: unit vectors of the chosen queries.
      gallery: unit vectors of the protocol's gallery.
      images: the image set that the protocol indexes.
      chosen: positions in `protocol.queries`; None for all queries.
    """
    return metrics_from_ranks(ranks_of(queries, gallery, images, protocol, chosen))


def ranks_of(
    queries: np.ndarray, gallery: np.ndarray, images: ImageSet, protocol: Protocol,
    chosen: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Ranks of all positives of the chosen queries (`afa.retrieval.exact.positive_ranks`).

    Arguments as in `ranked_metrics`.
    """
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
        self.embedding = Embedding(networks, config.backbone.name, config.data, config.evaluation)

    def validation(self, variables: PyTree, generator: bool = False) -> dict[str, float]:
        """Computes R@1 and MAP@R on validation classes (leave-one-out, clean queries).

        Args:
          variables: variables of the networks.
          generator: whether G has been trained; its view is then fused with the global and the
            local view.

        Returns:
          "recall_at_1" and "map_at_r" of the fused descriptor, and the same with the prefix
          "global_" for the global view alone. "map_at_r" selects the best checkpoint.
        """
        images = self.dataset.validation
        count = self.config.evaluation.validation_queries
        wild = self._drawn(images, np.flatnonzero(~images.catalogue), count)
        images = images.subset(wild)
        if generator:
            embedded = self.embedding.some(variables, images, WITH_GENERATOR.blocks)
            fused_vectors = embedded.fused(WITH_GENERATOR)
        else:
            embedded = self.embedding.plain(variables, images)
            fused_vectors = embedded.blocks["fused"]
        protocol = protocols(images, "leave_one_out")[0]

        def metrics(vectors: np.ndarray) -> Mapping[str, float]:
            return ranked_metrics(vectors, vectors, images, protocol).means

        global_only, fused = metrics(embedded.blocks["global"]), metrics(fused_vectors)
        return {
            "recall_at_1": fused["recall_at_1"],
            "map_at_r": fused["map_at_r"],
            "global_recall_at_1": global_only["recall_at_1"],
            "global_map_at_r": global_only["map_at_r"],
        }

    def variants(self, variables: PyTree, initial: PyTree) -> list[Variant]:
        """Builds the variants of the result table, with weights chosen on validation classes.

        Args:
          variables: variables of the trained networks.
          initial: variables of the embedder before training.
        """
        blocks = ("global", "local", *self.networks.view_names)
        score, offset = self._validation(lambda s, c: self.embedding.blocks(variables, s, c))
        initial_score, _ = self._validation(
            lambda s, c: self.embedding.pooled(initial, s, blocks, c)
        )
        return build_variants(
            self.networks,
            score,
            initial_score,
            offset,
            costs(self.networks, variables, self.config),
            self.config.evaluation.search_cost,
        )

    def _validation(self, embed: Embed) -> tuple[Score, Offset]:
        """Returns two functions that choices on validation classes need.

        Score: fusion -> MAP@R, averaged over clean queries and the trained corruptions. Offset:
        (judge, view, share) -> the offset with which a view beats the original for this share of
        these queries.
        """
        images, config = self.dataset.validation, self.config.evaluation
        protocol = protocols(images, "leave_one_out")[0]
        gallery = embed(images.subset(protocol.gallery), None)
        drawn = self._drawn(images, protocol.queries, config.corruption_queries)
        at = np.searchsorted(protocol.queries, drawn)
        trained = [(name, CHOICE_SEVERITY) for name in self.config.data.corruptions]
        conditions = [gallery.rows(at), *(embed(images.subset(drawn), c) for c in trained)]

        def score(fusion: Fusion) -> float:
            vectors = gallery.fused(fusion, "gallery")
            found = [
                ranked_metrics(each.fused(fusion), vectors, images, protocol, at)
                for each in conditions
            ]
            return float(np.mean([metrics.means["map_at_r"] for metrics in found]))

        def offset(judge: str, view: str, share: float) -> float:
            ahead = [each.scores[judge][ORIGINAL] - each.scores[judge][view] for each in conditions]
            return float(np.quantile(np.concatenate(ahead), share))

        return score, offset

    def _drawn(self, images: ImageSet, index: np.ndarray, count: int) -> np.ndarray:
        """Draws the same images for every training seed, so that runs can be paired by query."""
        return drawn_evenly(images, index, count, self.config.evaluation.corruption_seed)

    def test(
        self,
        variables: PyTree,
        initial: PyTree,
        variants: Sequence[Variant],
        note: Callable[[str], None],
    ) -> Results:
        """Evaluates every variant on the test classes: clean, then every corruption and severity.

        Args:
          variables: variables of the trained networks.
          initial: variables of the embedder before training.
          variants: from `variants`.
          note: receives one line of progress per corruption.
        """
        images, config, results = self.dataset.test, self.config, Results()
        listed = protocols(images, config.evaluation.protocol)
        embed = self._sources(variables, initial, variants)
        clean = {source: function(images, None) for source, function in embed.items()}
        galleries = {
            (v.name, p.name): clean[v.source].rows(p.gallery).fused(v.fusion, "gallery")
            for v in variants
            for p in listed
        }
        for v in variants:
            results.variants[v.name] = {"cost": v.cost, "fusion": v.fusion.to_json()}
            for p in listed:
                queries = clean[v.source].rows(p.queries).fused(v.fusion)
                results.variants[v.name][p.name] = self._clean(
                    v.name, queries, galleries[v.name, p.name], p, results
                )
        query_index = listed[0].queries  # every protocol of a split has the same queries
        drawn = self._drawn(images, query_index, config.evaluation.corruption_queries)
        at = np.searchsorted(query_index, drawn)
        for name in CORRUPTIONS:
            for severity in config.evaluation.severities:
                corrupted = {
                    source: function(images.subset(drawn), (name, severity))
                    for source, function in embed.items()
                }
                for v, p in itertools.product(variants, listed):
                    queries = corrupted[v.source].fused(v.fusion)
                    metrics = ranked_metrics(queries, galleries[v.name, p.name], images, p, at)
                    kept = results.variants[v.name][p.name]["corruptions"].setdefault(name, {})
                    kept[str(severity)] = {each: metrics.means[each] for each in SHORT}
                    _record(results, v.name, p, images, drawn, name, severity, metrics)
            note(f"evaluated {name} on {len(drawn)} queries")
        _add_means(results, config)
        return results

    def _sources(
        self, variables: PyTree, initial: PyTree, variants: Sequence[Variant]
    ) -> dict[str, Embed]:
        """Source -> function from images to descriptor blocks, for the sources that are used."""
        blocks = {b: None for v in variants if v.source == "initial" for b in v.fusion.blocks}
        every: dict[str, Embed] = {
            "trained": lambda s, c: self.embedding.blocks(variables, s, c),
            "initial": lambda s, c: self.embedding.pooled(initial, s, tuple(blocks), c),
            "pixels": lambda s, c: pixels(s, self.config.data, self.config.evaluation, c),
        }
        used = {v.source for v in variants}
        return {source: function for source, function in every.items() if source in used}

    def _clean(
        self, name: str, queries: np.ndarray, gallery: np.ndarray, p: Protocol, results: Results
    ) -> dict[str, Any]:
        """Metrics of a variant for clean queries under one protocol."""
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
    """Appends one row per query to the per-query table."""
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
    """Adds the means over the trained and over the held-back corruptions and their severities."""
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
