"""Summarises several runs of one kind: seeds, or the folds of a cross-validation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int64

from afa.data.types import ImageSet
from afa.errors import UserError
from afa.evaluation import statistics
from afa.evaluation.metrics.retrieval import metrics_from_ranks
from afa.evaluation.protocols import protocols
from afa.evaluation.statistics import Estimate
from afa.retrieval.exact import positive_ranks
from afa.retrieval.export import read_export
from afa.runs.compare import CONDITIONS, Run, common_figures, over_runs
from afa.workdir import Workdir

FUSED = "fused"  # the variant whose descriptors are exported
TOGETHER = "fused, together"


@dataclass(frozen=True)
class Line:
    """Summary of one variant under one protocol and condition.

    Attributes:
      variant, protocol, condition: names.
      each: the metric of each run.
      mean: mean over queries and runs.
      classes: the mean with the interval of a bootstrap over classes.
      runs: the mean with the interval over runs; None for a single run.
    """

    variant: str
    protocol: str
    condition: str
    each: tuple[float, ...]
    mean: float
    classes: Estimate
    runs: Estimate | None


def summarise(runs: Sequence[Run], metric: str = "map_at_r") -> list[Line]:
    """Summarises every variant, protocol and condition that all runs have in common.

    Args:
      runs: finished runs.
      metric: a metric of the per-query table.

    Raises:
      UserError: runs on different images or queries, an unknown metric, or nothing in common.
    """
    lines = []
    for key, _, labels, values in common_figures(runs, metric):
        each = np.nanmean(values, axis=1)
        lines.append(
            Line(
                *key,
                each=tuple(each.tolist()),
                mean=float(each.mean()),
                classes=statistics.bootstrap(values.mean(axis=0), labels),
                runs=over_runs(each),
            )
        )
    return lines


def together(runs: Sequence[Run], metric: str = "map_at_r") -> list[Line]:
    """Evaluates the ensemble of all runs on clean queries.

    The fused descriptors of all runs are concatenated to one unit vector ("concatenated" in
    Musgrave et al. 2020, section 3.3).

    Args:
      runs: finished runs, at least two.
      metric: a metric of the per-query table.

    Raises:
      UserError: as `summarise`, fewer than two runs, or test images that were not all exported.
    """
    if len(runs) < 2:
        raise UserError("--together needs at least 2 runs")
    names, catalogue, gallery = _test_images(runs[0])
    exports = [_exported(run, names) for run in runs]
    vectors = np.concatenate([each for each, _ in exports], axis=1) / np.float32(len(runs) ** 0.5)
    classes = exports[0][1]
    unread = [b""] * len(names)  # protocols need no pixels
    images = ImageSet(unread, classes, tuple(names), catalogue, gallery)
    row_of = {name: i for i, name in enumerate(names)}
    lines = []
    for (variant, name, condition), queries, labels, _ in common_figures(runs, metric):
        if variant != FUSED or condition != CONDITIONS[0]:
            continue
        (protocol,) = protocols(images, name)
        rows = np.array([row_of[query] for query in queries])
        at = np.searchsorted(protocol.queries, rows)
        ranks = positive_ranks(
            vectors[rows],
            vectors[protocol.gallery],
            labels,
            classes[protocol.gallery],
            protocol.exclude[at],
        )
        values = metrics_from_ranks(np.asarray(ranks)).per_query[metric]
        mean = statistics.bootstrap(values, labels)
        lines.append(Line(TOGETHER, name, CONDITIONS[0], (), mean.mean, mean, None))
    return lines


def _test_images(
    run: Run,
) -> tuple[list[str], Bool[np.ndarray, "n"], Bool[np.ndarray, "n"] | None]:
    """Reads the ids of the test images, and whether each is of the catalogue or the gallery."""
    path = Workdir(run.path).split
    try:
        split = json.loads(path.read_text("utf-8"))["splits"]["test"]
        ids, gallery = split["ids"], split.get("gallery")
        of_catalogue = np.isin(ids, split.get("catalogue", []))
        return ids, of_catalogue, None if gallery is None else np.isin(ids, gallery)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a stored split ({error})") from None


def _exported(
    run: Run, names: Sequence[str]
) -> tuple[Float32[np.ndarray, "n d"], Int64[np.ndarray, "n"]]:
    """Reads the descriptors and classes of these images."""
    records, _ = read_export(Workdir(run.path).embeddings)
    row_of = {str(name): i for i, name in enumerate(records.ids)}
    if missing := [name for name in names if name not in row_of]:
        raise UserError(f"{run.path}: its embeddings lack {missing[0]!r}; start the run again")
    rows = [row_of[name] for name in names]
    return records.vectors[rows], records.labels[rows]
