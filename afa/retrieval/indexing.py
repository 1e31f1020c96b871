"""Builds, tunes and measures the index over a gallery."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from afa.config import RetrievalConfig
from afa.errors import UserError
from afa.retrieval import export, index
from afa.retrieval.index import tuning, uri
from afa.retrieval.index.contract import Index
from afa.retrieval.records import Records

AUTO = "auto"


def address(retrieval: RetrievalConfig) -> uri.Address:
    """Returns the address of the search engine.

    Raises:
      UserError: an address that cannot be used here, or a target recall for an engine that cannot
        be tuned.
    """
    if not 0 <= retrieval.target_recall <= 1:
        raise UserError(f"retrieval.target_recall={retrieval.target_recall} must lie in [0, 1]")
    found = index.check(index.default_uri() if retrieval.index == AUTO else retrieval.index)
    if retrieval.target_recall and found.scheme != "scann":
        raise UserError(
            f"retrieval.target_recall={retrieval.target_recall}: only scann:// is tuned, not "
            f"{found.text}"
        )
    if retrieval.target_recall and found.options:
        raise UserError(
            f"retrieval.target_recall={retrieval.target_recall} chooses the options of scann://, "
            f"but {found.text} sets some"
        )
    return found


def indexed(
    directory: Path,
    retrieval: RetrievalConfig,
    note: Callable[[str], None],
    records: Records | None = None,
    manifest: dict[str, Any] | None = None,
) -> tuple[Index, dict[str, Any]]:
    """Builds an index, tunes it if a target recall is set, and measures it.

    Args:
      directory: of the index.
      retrieval: engine, target recall and results per query.
      note: receives lines of progress of the tuning.
      records, manifest: the gallery, as in `index.build`.

    Returns:
      The index, and measurements as JSON values: `engine`, `uri`, `gallery_size`, `dimension`,
      `plan`, `build_seconds`; those of `tuning.measure` if the gallery has at least two images;
      and after tuning `target`, `reached` and `curve`, the Pareto front of (recall, queries per
      second).

    Raises:
      UserError: as `address` and `index.build`.
    """
    chosen = address(retrieval)
    images = export.read_export(directory)[0] if records is None else records
    k = retrieval.results
    tuned, facts = None, {}
    if retrieval.target_recall:
        tuned = tuning.tune(
            images.vectors,
            retrieval.target_recall,
            min(k, len(images) - 1),
            retrieval.tune_seconds,
            retrieval.tune_for == "single",
            note=note,
        )
        facts = {
            "target": retrieval.target_recall,
            "reached": tuned.reached,
            "curve": tuned.frontier(),
        }
    built = index.build(directory, chosen.text, tuned and tuned.engine, records, manifest)
    return built, {
        "engine": chosen.scheme,
        "uri": chosen.text,
        "gallery_size": len(images),
        "dimension": built.dimension,
        "plan": built.info()["engine"],
        "build_seconds": tuned.point.build_seconds if tuned else _seconds(built),
        **(tuning.measure(built, images, k) if len(images) > 1 else {}),
        **facts,
    }


def _seconds(built: Index) -> float:
    return built.manifest["engine"]["build_seconds"]
