"""Makes and keeps an index over images of one's own, embedded with a trained run.

  python -m experiments.index build --run=DIR --images=DIR --out=DIR
  python -m experiments.index add --index=DIR --images=DIR
  python -m experiments.index remove --index=DIR ID ...
  python -m experiments.index info --index=DIR
  python -m experiments.index tune --index=DIR --target_recall=0.98
  python -m experiments.index verify --index=DIR

The path of an image within the folder is its id, the folder it lies in its class. All folders
below are read. Hidden ones, formats that cannot be decoded here and folders of results are left out
and told. Then
`python -m experiments.search --index=DIR IMAGE` answers.
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
from experiments.search import tell

if TYPE_CHECKING:
    from afa.data.listing import Found

PROGRAM = "python -m experiments.index"


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = options.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    for name, (run, text, add) in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(action=run)
        add(action)
    return options


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
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
    address(settings)  # settings are checked before the images are embedded
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
    there = searcher.index
    _refuse_same("--index", chosen.index, chosen.images)
    require_writable(chosen.index, "--index")
    found = _images(chosen.images, searcher.embedder.workdir.root, chosen.index)
    if not chosen.replace:  # before the images are embedded
        there.require_new(found.ids)
    records = gallery.embed_folder(searcher.embedder, found, note)
    before, held = len(there), there.holds(records.ids)
    if held.any():
        there.update(records.rows(held))
    if not held.all():
        there.add(records.rows(~held))
    if "unknown" in there.manifest:
        note("the gallery has changed: `no match` needs a new calibration (build --calibrate)")
        there.manifest = {n: v for n, v in there.manifest.items() if n != "unknown"}
    there.save()
    _show({"before": before, **there.info()}, chosen.json)


def _remove(chosen: argparse.Namespace) -> None:
    from afa.retrieval import index

    there = index.load(chosen.index)
    ids = (
        [line.strip() for line in sys.stdin if line.strip()] if chosen.ids == ["-"] else chosen.ids
    )
    there.remove(_numbers(ids) if there.info()["ids"] == "whole numbers" else ids)
    there.save()
    _show(there.info(), chosen.json)


def _numbers(words: Sequence[str]) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        odd = next(word for word in words if not word.lstrip("-").isdigit())
        raise UserError(f"ids of this index are whole numbers, but {odd!r} is none") from None


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

    there = index.load(chosen.index)  # every file against its hash, every vector
    if chosen.run is not None or "run" in there.manifest:
        Searcher.load(chosen.run, chosen.index)  # ... and the networks against the vectors
    facts = there.info()
    if isinstance(there, LocalIndex) and len(there) > 1:
        facts |= tuning.measure(there, there.records())
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
            f"{option}={directory}: is the folder of the images, and its sheets of results would "
            "be taken for images; name another directory"
        )


def _images(folder: Path, *results: Path) -> "Found":
    """The images of a folder, without folders of results; what else is left out is told."""
    from afa.data.listing import some_under

    found = some_under(folder, results)
    tell(found)
    return found


def _unknown(embedder: Any, found: "Found", records: Any) -> list[float]:
    import numpy as np

    from afa.retrieval import calibration, gallery

    unknown_queries = gallery.embed_folder(embedder, found, note)
    apart = np.full(len(unknown_queries), -1)  # of no class that the gallery holds
    best = calibration.best_scores(unknown_queries.vectors, apart, records.vectors, records.labels)
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
    action.add_argument("--json", action="store_true", help="the figures as one JSON object")


def _tuning_options(action: Parser, required: bool) -> None:
    from afa.config import RetrievalConfig

    usual = RetrievalConfig()
    action.add_argument(
        "--target_recall", type=float, required=required, default=0.0, metavar="SHARE",
        help="recall that the settings of scann:// are tuned for by measurement, such as 0.98",
    )  # fmt: skip
    action.add_argument(
        "--tune_seconds", type=float, default=usual.tune_seconds, metavar="SECONDS",
        help=f"time budget of the tuning (default: {usual.tune_seconds:g})",
    )  # fmt: skip
    action.add_argument(
        "--tune_for", choices=("batch", "single"), default=usual.tune_for,
        help="speed of many queries in one call, or of one query after the other "
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
        help="images of objects that the gallery does not hold, so that a search can answer "
        "`no match`",
    )  # fmt: skip
    _tuning_options(action, required=False)
    _json_option(action)


def _add_options(action: Parser) -> None:
    _index_option(action)
    _run_option(action)
    _directory(action, "--images", "folder of images")
    action.add_argument(
        "--replace", action="store_true", help="images whose id is there are embedded again"
    )


def _verify_options(action: Parser) -> None:
    _index_option(action)
    _run_option(action)


def _run_option(action: Parser) -> None:
    action.add_argument(
        "--run", type=Path, default=None, metavar="DIR",
        help="the run that made it, where it does not stand beside the index any more",
    )  # fmt: skip


def _remove_options(action: Parser) -> None:
    _index_option(action)
    action.add_argument("ids", nargs="+", metavar="ID", help="id, or - for one a line")


def _tune_options(action: Parser) -> None:
    _index_option(action)
    _tuning_options(action, required=True)


Action = tuple[Callable[[argparse.Namespace], None], str, Callable[[Parser], None]]
ACTIONS: dict[str, Action] = {
    "build": (_build, "embeds a folder of images and builds an index", _build_options),
    "add": (_add, "adds the images of a folder", _add_options),
    "remove": (_remove, "removes images by their ids", _remove_options),
    "info": (_info, "says what an index holds and how it searches", _index_option),
    "tune": (_tune, "chooses the settings of scann:// by measurement", _tune_options),
    "verify": (
        _verify,
        "checks its files, vectors and networks, and measures recall and speed",
        _verify_options,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
