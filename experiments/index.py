"""Builds and changes an index of your own images, embedded with a trained run.

  python -m experiments.index build --run=DIR --images=DIR --out=DIR
  python -m experiments.index add --index=DIR --images=DIR
  python -m experiments.index remove --index=DIR ID ...
  python -m experiments.index info --index=DIR
  python -m experiments.index tune --index=DIR --target_recall=0.98
  python -m experiments.index verify --index=DIR

The id of an image is its path relative to the folder; its class is the folder that contains it.
Subfolders are read. Hidden folders, formats that cannot be decoded and folders of results are
skipped and reported. Search it with `python -m experiments.search --index=DIR IMAGE`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import UserError
from afa.io import require_writable
from experiments.cli import Parser, note, perform
from experiments.search import report_skipped

if TYPE_CHECKING:
    from afa.data.listing import Found

PROGRAM = "python -m experiments.index"


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser.of(PROGRAM, __doc__)
    actions = options.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    for name, (run, text, add) in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(action=run)
        add(action)
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    chosen.action(chosen)
    return 0


# ---- actions -----------------------------------------------------------------------------------


def _build(chosen: argparse.Namespace) -> None:
    from afa.inference.load import TrainedEmbedder
    from afa.retrieval import calibration, gallery
    from afa.retrieval.indexing import address, indexed

    settings = _settings(chosen, chosen.uri)
    address(settings)  # checks the settings before the images are embedded
    require_writable(chosen.out, "--out")
    _refuse_same("--out", chosen.out, chosen.images)
    embedder = TrainedEmbedder.load(chosen.run)
    found = _images(chosen.images, chosen.run, chosen.out)
    others = _images(chosen.calibrate, chosen.run, chosen.out) if chosen.calibrate else None
    if others is not None:
        calibration.require_apart(others.paths, found.paths)
    records = gallery.embed_folder(embedder, found, note)
    extra: dict[str, Any] = {"run": os.path.relpath(chosen.run.resolve(), chosen.out.resolve())}
    if others is not None:
        extra["unknown"] = _unknown(embedder, others, records)
    facts = indexed(chosen.out, settings, note, records, embedder.record | extra)[1]
    _show(facts, chosen.json)


def _add(chosen: argparse.Namespace) -> None:
    from afa.retrieval import gallery
    from afa.retrieval.search import Searcher

    searcher = Searcher.load(chosen.run, chosen.index)
    built = searcher.index
    _refuse_same("--index", chosen.index, chosen.images)
    require_writable(chosen.index, "--index")
    found = _images(chosen.images, searcher.embedder.workdir.root, chosen.index)
    if not chosen.replace:  # before the images are embedded
        built.require_new(found.ids)
    records = gallery.embed_folder(searcher.embedder, found, note)
    before, known = len(built), built.contains(records.ids)
    if known.any():
        built.update(records.rows(known))
    if not known.all():
        built.add(records.rows(~known))
    if "unknown" in built.manifest:
        note("the gallery has changed: `no match` needs a new calibration (build --calibrate)")
        built.manifest = {n: v for n, v in built.manifest.items() if n != "unknown"}
    built.save()
    _show({"before": before, **built.info()}, chosen.json)


def _remove(chosen: argparse.Namespace) -> None:
    from afa.retrieval import index

    built = index.load(chosen.index)
    ids = (
        [line.strip() for line in sys.stdin if line.strip()] if chosen.ids == ["-"] else chosen.ids
    )
    built.remove(_numbers(ids) if built.info()["ids"] == "whole numbers" else ids)
    built.save()
    _show(built.info(), chosen.json)


def _numbers(words: Sequence[str]) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        odd = next(word for word in words if not word.lstrip("-").isdigit())
        raise UserError(f"ids of this index are whole numbers, but {odd!r} is not") from None


def _info(chosen: argparse.Namespace) -> None:
    from afa.retrieval import index

    _show(index.load(chosen.index).info(), chosen.json)


def _tune(chosen: argparse.Namespace) -> None:
    from afa.manifest import read_manifest
    from afa.retrieval.indexing import indexed

    require_writable(chosen.index, "--index")
    stored = (read_manifest(chosen.index).get("engine") or {}).get("uri", "scann://")
    if not stored.startswith(("scann://", "exact://")):
        raise UserError(f"--index={chosen.index}: only scann:// is tuned, not {stored}")
    facts = indexed(chosen.index, _settings(chosen, "scann://"), note)[1]
    _show(facts, chosen.json)
    if not facts["reached"]:
        raise UserError(
            f"--target_recall={chosen.target_recall}: not reached within {chosen.tune_seconds:g} s;"
            " the settings with the highest recall are kept"
        )


def _verify(chosen: argparse.Namespace) -> None:
    from afa.retrieval import index
    from afa.retrieval.index import tuning
    from afa.retrieval.index.local import LocalIndex
    from afa.retrieval.search import Searcher

    built = index.load(chosen.index)  # checks file hashes and vectors
    if chosen.run is not None or "run" in built.manifest:
        Searcher.load(chosen.run, chosen.index)  # checks that the networks match
    facts = built.info()
    if isinstance(built, LocalIndex) and len(built) > 1:
        facts |= tuning.measure(built, built.records())
    _show(facts, chosen.json)


# ---- helpers -----------------------------------------------------------------------------------


def _settings(chosen: argparse.Namespace, uri: str) -> Any:
    from afa.config import RetrievalConfig

    return RetrievalConfig(
        index=uri,
        target_recall=chosen.target_recall,
        tune_seconds=chosen.tune_seconds,
        tune_for=chosen.tune_for,
    )


def _refuse_same(option: str, directory: Path, folder: Path) -> None:
    if directory.resolve() == folder.resolve():
        raise UserError(
            f"{option}={directory}: is the folder of the images, and result images in it would be "
            "taken for gallery images; give another directory"
        )


def _images(folder: Path, *results: Path) -> "Found":
    """Lists the images of a folder, without folders of results; reports skipped files."""
    from afa.data.listing import some_under

    found = some_under(folder, results)
    report_skipped(found)
    return found


def _unknown(embedder: Any, found: "Found", records: Any) -> list[float]:
    import numpy as np

    from afa.retrieval import calibration, gallery

    unknown_queries = gallery.embed_folder(embedder, found, note)
    labels = np.full(len(unknown_queries), -1)  # of no class in the gallery
    best = calibration.best_scores(unknown_queries.vectors, labels, records.vectors, records.labels)
    return list(best.scores)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items())
        elif name == "curve":
            value = "; ".join(f"{recall:.4f} {speed:,.0f}/s" for recall, speed in value)
        elif isinstance(value, float):
            value = f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        print(f"{name.replace('_', ' '):26}{value}")


def _index_option(action: Parser) -> None:
    _directory(action, "--index", "directory of the index")
    _json_option(action)


def _directory(action: Parser, name: str, text: str) -> None:
    action.add_argument(name, required=True, type=Path, metavar="DIR", help=text)


def _json_option(action: Parser) -> None:
    action.add_argument("--json", action="store_true", help="print the results as one JSON object")


def _tuning_options(action: Parser, required: bool) -> None:
    from afa.config import RetrievalConfig

    usual = RetrievalConfig()
    action.add_argument(
        "--target_recall", type=float, required=required, default=0.0, metavar="SHARE",
        help="recall to tune the settings of scann:// for, by measurement, such as 0.98",
    )  # fmt: skip
    action.add_argument(
        "--tune_seconds", type=float, default=usual.tune_seconds, metavar="SECONDS",
        help=f"time budget of the tuning (default: {usual.tune_seconds:g})",
    )  # fmt: skip
    action.add_argument(
        "--tune_for", choices=("batch", "single"), default=usual.tune_for,
        help="optimise the speed of many queries in one call, or of one query per call "
        f"(default: {usual.tune_for})",
    )  # fmt: skip


def _build_options(action: Parser) -> None:
    _directory(action, "--run", "directory of a finished run")
    _directory(action, "--images", "folder of images")
    _directory(action, "--out", "directory of the new index")
    action.add_argument(
        "--uri", default="auto", help="exact://, scann:// or milvus://... (default: auto)"
    )
    action.add_argument(
        "--calibrate", type=Path, default=None, metavar="DIR",
        help="folder of images of objects that are not in the gallery, so that a search can report "
        "`no match`",
    )  # fmt: skip
    _tuning_options(action, required=False)
    _json_option(action)


def _add_options(action: Parser) -> None:
    _index_option(action)
    _run_option(action)
    _directory(action, "--images", "folder of images")
    action.add_argument(
        "--replace", action="store_true", help="replace images whose id is already in the index"
    )


def _verify_options(action: Parser) -> None:
    _index_option(action)
    _run_option(action)


def _run_option(action: Parser) -> None:
    action.add_argument(
        "--run", type=Path, default=None, metavar="DIR",
        help="the run that embedded the index (default: the one that the index names)",
    )  # fmt: skip


def _remove_options(action: Parser) -> None:
    _index_option(action)
    action.add_argument(
        "ids", nargs="+", metavar="ID", help="id, or - to read one per line from standard input"
    )


def _tune_options(action: Parser) -> None:
    _index_option(action)
    _tuning_options(action, required=True)


Action = tuple[Callable[[argparse.Namespace], None], str, Callable[[Parser], None]]
ACTIONS: dict[str, Action] = {
    "build": (_build, "embed a folder of images and build an index", _build_options),
    "add": (_add, "add the images of a folder", _add_options),
    "remove": (_remove, "remove images by id", _remove_options),
    "info": (_info, "print the size, engine and settings of an index", _index_option),
    "tune": (_tune, "choose the settings of scann:// by measurement", _tune_options),
    "verify": (
        _verify,
        "check files, vectors and networks, and measure recall and speed",
        _verify_options,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
