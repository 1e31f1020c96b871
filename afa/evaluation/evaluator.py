"""Evaluation of a run: validation during training, and the table of test classes at its end.

Every figure comes from exact search. Weights are chosen on validation classes, with clean queries
and the trained corruptions; the test classes and the held-back corruptions are seen once, after
every choice.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import PyTree

from afa.config import ExperimentConfig
from afa.data.corruptions import CORRUPTIONS, held_back
from afa.data.pipeline import Corruption
from afa.data.types import Dataset, ImageSet
from afa.evaluation import variants
from afa.evaluation.metrics import extra
from afa.evaluation.metrics.retrieval import Metrics, metrics_from_ranks
from afa.evaluation.protocols import Protocol, drawn_evenly, protocols
from afa.inference.embed import Embedding, pixels
from afa.models.embedder import FUSED, Networks
from afa.retrieval.exact import positive_ranks

CHOICE_SEVERITY = 3  # of the trained corruptions when weights are chosen
SHORT = ("recall_at_1", "map_at_r")  # what is kept of every single corruption and severity
# Validation of a trained G: the fused descriptor that the metric loss trains, and G's view.
WITH_GENERATOR = FUSED | {"restored": 1.0}
FURTHER_ROWS = ("F", "fused")  # what a run is about, and what it is measured against


@dataclass
class Results:
    """What an evaluation found.

    Attributes:
      rows: row -> {"cost", "weights", protocol -> {"clean", "trained", "held_back",
        "corruptions": {name: {severity: figures}}, and for some rows "further"
        (`afa.evaluation.metrics.extra`)}}.
      per_query: columns of equal length, one entry a query, row, protocol and corruption.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
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
        wild = drawn_evenly(images, np.flatnonzero(~images.catalogue), count, self.config.seed)
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

        whole, fused = figures(described.blocks["global"]), figures(joined)
        return {
            "recall_at_1": fused["recall_at_1"],
            "map_at_r": fused["map_at_r"],
            "global_recall_at_1": whole["recall_at_1"],
            "global_map_at_r": whole["map_at_r"],
        }

    def rows(self, variables: PyTree) -> list[variants.Row]:
        """The rows of the table, with weights chosen on validation classes."""
        images = self.dataset.validation
        protocol = protocols(images, "leave_one_out")[0]
        gallery = self.embedding.blocks(variables, images.subset(protocol.gallery))
        count = self.config.evaluation.corruption_queries
        drawn = drawn_evenly(images, protocol.queries, count, self.config.seed)
        chosen = np.searchsorted(protocol.queries, drawn)
        seen: list[Corruption] = [(n, CHOICE_SEVERITY) for n in self.config.data.corruptions]
        corrupted = [self.embedding.blocks(variables, images.subset(drawn), c) for c in seen]
        conditions = [gallery.rows(chosen), *corrupted]

        def score(weights: variants.Weights) -> float:
            place = gallery.fused(weights)
            found = [
                ranked_metrics(each.fused(weights), place, images, protocol, chosen)
                for each in conditions
            ]
            return float(np.mean([metrics.means["map_at_r"] for metrics in found]))

        costs = variants.costs(self.networks, variables, self.config)
        return variants.rows(self.networks, score, costs)

    def test(
        self,
        variables: PyTree,
        untrained: PyTree,
        chosen_rows: list[variants.Row],
        note: Callable[[str], None],
    ) -> Results:
        """Every row on the test classes: clean queries, then every corruption and severity."""
        images, config = self.dataset.test, self.config
        results = Results()
        listed = protocols(images, config.evaluation.protocol)
        describe = {
            "trained": lambda s, c: self.embedding.blocks(variables, s, c),
            "untrained": lambda s, c: self.embedding.plain(untrained, s, c),
            "pixels": lambda s, c: pixels(s, config, c),
        }
        clean = {source: function(images, None) for source, function in describe.items()}
        galleries = {
            (row.name, p.name): clean[row.source].rows(p.gallery).fused(row.weights)
            for row in chosen_rows
            for p in listed
        }
        for row in chosen_rows:
            results.rows[row.name] = {"cost": row.cost, "weights": row.weights}
            for p in listed:
                queries = clean[row.source].rows(p.queries).fused(row.weights)
                place = galleries[row.name, p.name]
                ranks = ranks_of(queries, place, images, p)
                metrics = metrics_from_ranks(ranks)
                results.rows[row.name][p.name] = {"clean": metrics.means, "corruptions": {}}
                if row.name in FURTHER_ROWS:
                    found = extra.figures(queries, place, ranks, images, p, config.seed)
                    results.rows[row.name][p.name]["further"] = found
                _record(results, row.name, p, images, p.queries, "", 0, metrics)
        asked = listed[0].queries  # every protocol of a split asks the same queries
        # The same for every seed: runs are compared query by query.
        drawn = drawn_evenly(images, asked, config.evaluation.corruption_queries, seed=0)
        queries_set, chosen = images.subset(drawn), np.searchsorted(asked, drawn)
        for name in CORRUPTIONS:
            for severity in config.evaluation.severities:
                corrupted = {s: f(queries_set, (name, severity)) for s, f in describe.items()}
                for row in chosen_rows:
                    queries = corrupted[row.source].fused(row.weights)
                    for p in listed:
                        metrics = ranked_metrics(
                            queries, galleries[row.name, p.name], images, p, chosen
                        )
                        kept = results.rows[row.name][p.name]["corruptions"].setdefault(name, {})
                        kept[str(severity)] = {each: metrics.means[each] for each in SHORT}
                        _record(results, row.name, p, images, drawn, name, severity, metrics)
            note(f"evaluated {name} on {len(drawn)} queries")
        _add_means(results, config)
        return results


def _record(
    results: Results, row: str, protocol: Protocol, images: ImageSet, index: np.ndarray,
    corruption: str, severity: int, metrics: Metrics,
) -> None:  # fmt: skip
    """Appends one line a query to the per-query table."""
    count = len(index)
    columns: dict[str, Iterable[Any]] = {
        "row": [row] * count,
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
    for row in results.rows.values():
        for figures in (each for each in row.values() if isinstance(each, dict)):
            if "corruptions" not in figures:
                continue
            for group, names in groups.items():
                found = [f for n in names for f in figures["corruptions"][n].values()]
                figures[group] = {
                    name: float(np.mean([each[name] for each in found])) for name in SHORT if found
                }
