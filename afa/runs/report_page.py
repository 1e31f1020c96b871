"""Collects the content of `report.html` from a finished evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int64, PyTree, UInt8

from afa.data.corruptions import CORRUPTIONS
from afa.data.images import decode
from afa.data.pipeline import Corruption, eval_batches
from afa.data.types import ImageSet
from afa.evaluation import restoration
from afa.evaluation.evaluator import Evaluator
from afa.evaluation.protocols import Protocol, drawn_evenly, protocols
from afa.losses.adversarial import psnr
from afa.models import layers
from afa.models.fusion import Fusion
from afa.report.page import Hit, Page, QueryRow, Restoration, ResultRow, SearchFacts
from afa.retrieval.exact import topk
from afa.train.logging import read_history

QUERIES, FAILURES, HITS, SAMPLES = 8, 6, 8, 24
CORRUPTED_AT_3 = [(name, 3) for name in CORRUPTIONS]  # corruptions of the images that are shown
GROUPS = ("trained", "held_back")


def page(
    experiment: str,
    result: Mapping[str, Any],
    evaluator: Evaluator,
    variables: PyTree,
    fusion: Fusion,
    workdir: Path,
) -> Page:
    """Builds the report page of a run.

    Args:
      result: content of `result.json`.
      fusion: of the fused descriptor.
      workdir: run directory, with `metrics.jsonl`.
    """
    config, dataset, images = evaluator.config, evaluator.dataset, evaluator.dataset.test
    protocol = protocols(images, config.evaluation.protocol)[0]
    table, search = result["metrics"]["test"], result["metrics"]["search"]
    clean, corrupted, failures = _strips(evaluator, variables, fusion, protocol)
    restorations = _restorations(evaluator, variables) if evaluator.networks.generator else []
    return Page(
        title=f"{experiment}: {dataset.name}",
        experiment=experiment,
        dataset=dataset.name,
        protocol=f"{dataset.protocol}; {protocol.name.replace('_', '-')}",
        hardware=result["hardware"],
        date=result["date"],
        commit=result["commit"],
        seeds=[config.seed],
        train_seconds=float(result["timings"]["training_steps"]),
        parameters=result["parameters"],
        facts={
            "Training images": f"{config.data.image_size} px, {config.data.batch_size} per step",
            "Steps": str(result["step"]),
            "Fused descriptor": fusion.text(),
        },
        highlight="fused",
        reference="F",
        rows=[_result_row(name, row["cost"], row[protocol.name]) for name, row in table.items()],
        queries=[*clean, *corrupted],
        failures=failures,
        restorations=restorations,
        samples=_samples(evaluator, variables),
        history=read_history(workdir),
        robustness={
            name: {
                corruption: {int(s): figures["recall_at_1"] for s, figures in severities.items()}
                for corruption, severities in row[protocol.name]["corruptions"].items()
            }
            for name, row in table.items()
            if name in ("raw pixels", "initial weights", "F", "F + G", "fused")
        },
        held_back=result["data"]["held_back_corruptions"],
        search=_search_facts(search, config.retrieval.results),
        restored=result["metrics"]["restoration"],
        notes=[
            *restoration.warnings(result["metrics"]["restoration"], config.data.corruptions),
            *(f"skipped: {each}" for each in dataset.skipped),
        ],
    )


def _result_row(name: str, cost: float | None, figures: Mapping[str, Any]) -> ResultRow:
    groups = (figures[group] for group in GROUPS)
    return ResultRow(name, cost, figures["clean"], *groups, extra=figures.get("extra", {}))


def _search_facts(search: Mapping[str, Any], results: int) -> SearchFacts:
    return SearchFacts(
        search["engine"],
        results,
        search[f"recall_at_{results}"],
        search["queries_per_second"],
        search["single_queries_per_second"],
        search["gallery_size"],
        search["dimension"],
        search["plan"],
        search.get("target", 0.0),
        search.get("curve", ()),
    )


def _strips(
    evaluator: Evaluator, variables: PyTree, fusion: Fusion, protocol: Protocol
) -> tuple[list[QueryRow], list[QueryRow], list[QueryRow]]:
    """Returns rows of clean queries, of corrupted queries, and of the worst clean failures."""
    config, images = evaluator.config, evaluator.dataset.test
    seed = config.evaluation.corruption_seed
    embed = evaluator.embedding.fused(fusion)
    as_query, as_gallery = evaluator.embedding.in_both_roles(fusion)(variables, images)
    gallery, queries = as_gallery[protocol.gallery], as_query[protocol.queries]
    hits = min(HITS, len(protocol.gallery) - 1)
    some = drawn_evenly(images, protocol.queries, QUERIES, seed + 1)
    at = np.searchsorted(protocol.queries, some)

    def rows(
        vectors: Float32[np.ndarray, "q d"], at: Int64[np.ndarray, "q"], corrupted: bool = False
    ) -> list[QueryRow]:
        scores, found = topk(vectors, gallery, hits, protocol.exclude[at])
        query_images = [decode(images.images[int(protocol.queries[q])]) for q in at]
        if corrupted:
            subset = images.subset(protocol.queries[at])
            query_images = np.concatenate(
                list(eval_batches(subset, config.data, len(at), CORRUPTED_AT_3[: len(at)], seed))
            )
        return [
            _row(
                evaluator,
                images,
                protocol,
                int(q),
                query_images[i],
                found[i],
                scores[i],
                _label(CORRUPTED_AT_3[i]) if corrupted else "",
            )
            for i, q in enumerate(at)
        ]

    clean = rows(queries[at], at)
    few = at[: len(CORRUPTED_AT_3)]
    corrupted = embed(variables, images.subset(protocol.queries[few]), CORRUPTED_AT_3[: len(few)])
    corrupted_rows = rows(corrupted, few, corrupted=True)
    scores, found = topk(queries, gallery, hits, protocol.exclude)
    labels, targets = images.labels[protocol.queries], images.labels[protocol.gallery]
    right = targets[found] == labels[:, None]
    # Worst: no positive among the results, and the highest score of a wrong first result.
    order = np.lexsort((-scores[:, 0], right.any(axis=1), right[:, 0]))
    worst = [int(q) for q in order[:FAILURES] if not right[q, 0]]
    failures = rows(queries[worst], np.array(worst, np.int64)) if worst else []
    return clean, corrupted_rows, failures


def _label(corruption: Corruption) -> str:
    return f"{corruption[0].replace('_', ' ')}, severity {corruption[1]}"


def _row(
    evaluator: Evaluator, images: ImageSet, protocol: Protocol, query: int,
    image: UInt8[np.ndarray, "h w 3"], found: np.ndarray, scores: np.ndarray, corruption: str,
) -> QueryRow:  # fmt: skip
    """One query image with its result images."""
    names, index = evaluator.dataset.class_names, int(protocol.queries[query])
    hits = []
    for row, score in zip(found, scores, strict=True):
        hit = int(protocol.gallery[row])
        hits.append(
            Hit(
                decode(images.images[hit]),
                images.ids[hit],
                float(score),
                bool(images.labels[hit] == images.labels[index]),
                names[images.labels[hit]],
            )
        )
    return QueryRow(image, images.ids[index], names[images.labels[index]], hits, corruption)


def _restorations(evaluator: Evaluator, variables: PyTree) -> list[Restoration]:
    """One image per corruption: corrupted, restored and clean; none if G restores mid maps."""
    if not evaluator.networks.space.images:
        return []
    images, config = evaluator.dataset.test, evaluator.config
    seed = config.evaluation.corruption_seed
    wild = np.flatnonzero(~images.catalogue)
    chosen = images.subset(drawn_evenly(images, wild, len(CORRUPTED_AT_3), seed + 2))
    corrupted = CORRUPTED_AT_3[: len(chosen)]
    degraded, restored = evaluator.embedding.restored(variables, chosen, corrupted)
    clean = np.concatenate(list(eval_batches(chosen, config.data, len(chosen))))
    target = jnp.asarray(clean, jnp.float32) / 255
    before, after = (np.asarray(psnr(jnp.asarray(x), target)) for x in (degraded, restored))
    restorations = []
    for i, corruption in enumerate(corrupted):
        triple = (to_pixels(degraded[i]), to_pixels(restored[i]), clean[i])
        psnrs = float(before[i]), float(after[i])
        restorations.append(Restoration(_label(corruption), *triple, *psnrs))
    return restorations


def _samples(evaluator: Evaluator, variables: PyTree) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Images that G samples from noise z; none if it samples mid maps."""
    generator = evaluator.networks.generator
    if generator is None or not evaluator.networks.space.images:
        return []
    z = jax.random.normal(
        jax.random.key(evaluator.config.seed), (SAMPLES, evaluator.networks.latent_dim)
    )
    sampled = jax.jit(lambda v, z: layers.apply(generator, v, z, method="sample"))(
        variables["generator"], z
    )
    return [to_pixels(np.asarray(each)) for each in sampled]


def to_pixels(image: Float32[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Converts an image in [0, 1] to uint8."""
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
