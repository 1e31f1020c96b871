"""Benchmarks whose positives are the images of one class: In-Shop, query and gallery folders."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from afa.data.listing import near_equal
from afa.data.sources import listed
from afa.data.sources.folder import GALLERY, QUERY, class_files
from afa.data.sources.inshop import read_partition
from afa.data.types import ImageSet
from afa.evaluation.benchmarks.contract import Benchmark, Figure, image_set, mean_figure
from afa.evaluation.metrics.retrieval import metrics_from_ranks
from afa.retrieval.exact import positive_ranks

INSHOP_CUTS = (1, 10, 20, 30, 40, 50)
FOLDER_CUTS = (1, 2, 4, 8)
NO_CLASS = -1
NAMES = {"map_at_r": "MAP@R", "r_precision": "R-precision", "mean_average_precision": "mAP"}


def load_inshop(name: str, root: Path, distractors: Sequence[Path]) -> Benchmark:
    """inshop: In-Shop queries searched in its gallery; Recall@K at the published K, MAP@R, mAP.

    Raises:
      UserError: the list or its images are missing or malformed.
    """
    found = read_partition(root)

    def part(status: str) -> ImageSet:
        at = np.flatnonzero(found.having(status)).tolist()
        files = [found.paths[i] for i in at]
        listed.require(files, found.source)
        return image_set(files, [found.ids[i] for i in at], found.labels[at])

    return _benchmark(name, part(QUERY), part(GALLERY), distractors, INSHOP_CUTS)


def load_folder(name: str, root: Path, distractors: Sequence[Path]) -> Benchmark:
    """folder: images of the class folders in query/ searched among those in gallery/.

    Raises:
      UserError: query/ or gallery/ is missing or is not a folder.
    """
    parts, notes = [], []
    for part in (QUERY, GALLERY):
        folder = listed.find(root, (part,), "a folder of class folders with images")
        listed.directory("--path", folder)
        layout = class_files(folder)
        parts.append(layout.parts[""])
        notes += [f"; {part}/: {line}" for line in layout.notes]
    number_of = {each: i for i, each in enumerate(sorted({*parts[0], *parts[1]}))}
    queries, gallery = (
        image_set(
            [path for files in part.values() for path in files],
            [path.relative_to(root).as_posix() for files in part.values() for path in files],
            np.repeat([number_of[each] for each in part], [len(files) for files in part.values()])
            .astype(np.int64),
        )
        for part in parts
    )  # fmt: skip
    names = near_equal({*parts[0], *parts[1]})
    notes += [f"; classes {a!r} and {b!r} count as two" for a, b in names]
    found = _benchmark(name, queries, gallery, distractors, FOLDER_CUTS)
    return dataclasses.replace(found, protocol=found.protocol + "".join(notes))


def _benchmark(
    name: str,
    queries: ImageSet,
    gallery: ImageSet,
    distractors: Sequence[Path],
    cuts: Sequence[int],
) -> Benchmark:
    query_labels = queries.labels
    none = np.full(len(distractors), NO_CLASS, np.int64)
    gallery_labels: Int64[np.ndarray, "n"] = np.concatenate([gallery.labels, none])
    files = [gallery.path(i) for i in range(len(gallery))] + list(map(str, distractors))

    def score(
        query_vectors: Float32[np.ndarray, "q d"], gallery_vectors: Float32[np.ndarray, "n d"]
    ) -> list[Figure]:
        ranks = positive_ranks(query_vectors, gallery_vectors, query_labels, gallery_labels)
        found = metrics_from_ranks(np.asarray(ranks), cuts)
        names = {f"recall_at_{k}": f"Recall@{k}" for k in cuts} | NAMES
        return [
            mean_figure("", names[each], values, query_labels)
            for each, values in found.per_query.items()
        ]

    return Benchmark(
        name,
        f"{len(queries)} queries of {len(queries.classes)} classes among {len(gallery)} images"
        + (f" and {len(distractors)} distractors" if distractors else ""),
        queries,
        image_set(files, [*gallery.ids, *map(str, distractors)], gallery_labels),
        score,
    )
