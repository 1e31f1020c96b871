"""Searches with a trained run: `python -m experiments.search --run=DIR [--json] IMAGE ...`, or in
an index of other images: `python -m experiments.search --index=DIR IMAGE ...`.

IMAGE is a file, a folder (all images in it and its subfolders), a file:// address, or - to read
them from standard input, one per line. Prints id, class and similarity of the most similar gallery
images, and saves an image of each query with its results.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from afa.errors import UserError, printable
from experiments.cli import Parser, perform

if TYPE_CHECKING:
    from afa.data.listing import Found

PROGRAM = "python -m experiments.search"


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    options.add_argument(
        "images", nargs="+", metavar="IMAGE", help="file, folder, file:// address, or -"
    )
    options.add_argument(
        "--run", type=Path, default=None,
        help="directory of a finished run (default: the one that the index names)",
    )  # fmt: skip
    options.add_argument(
        "--index", type=Path, default=None,
        help="directory of an index built by experiments.index (default: that of the run)",
    )  # fmt: skip
    options.add_argument(
        "--results", type=int, default=None,
        help="results per query (default: retrieval.results of the run, at most the gallery size)",
    )  # fmt: skip
    options.add_argument(
        "--false_matches", type=float, default=None, metavar="SHARE",
        help="report `no match` below the score that this share of unknown objects reaches, such "
        "as 0.05",
    )  # fmt: skip
    options.add_argument(
        "--rerank", default=None, metavar="NAME",
        help="re-ranking method, such as k_reciprocal, with the settings that experiments.rerank "
        "chose",
    )  # fmt: skip
    options.add_argument(
        "--json", action="store_true", help="print one JSON object per query, one per line"
    )
    options.add_argument(
        "--sheets", type=Path, default=None,
        help="directory of the result images (default: DIR/searches)",
    )  # fmt: skip
    return options


def images(words: Iterable[str], exclude: Sequence[Path] = ()) -> list[Path]:
    """Returns the image files of the arguments, in order; those of a folder are sorted by name.

    Args:
      words: files, folders, file:// addresses, or - for standard input.
      exclude: folders of results, which are skipped.

    Raises:
      UserError: a folder without images, an address that is not a local file, or no arguments.
    """
    from afa.data.listing import some_under

    found: list[Path] = []
    for word in words:
        if word == "-":
            found += images((line.strip() for line in sys.stdin if line.strip()), exclude)
            continue
        address = urlsplit(word)
        if address.scheme and "://" in word:
            if address.scheme != "file" or address.netloc not in ("", "localhost"):
                raise UserError(f"{word}: only file:// addresses of this machine can be read")
            word = unquote(address.path)
        path = Path(word)
        if not path.is_dir():
            found.append(path)
            continue
        under = some_under(path, exclude)
        report_skipped(under)
        found += under.paths
    if not found:
        raise UserError("no query images: standard input was empty")
    return found


def report_skipped(found: "Found") -> None:
    """Prints the skipped files of a folder to standard error."""
    for line in found.summaries():
        print(f"skipped in {found.root}: {line}", file=sys.stderr)


def _json(values: dict[str, Any]) -> str:
    """Returns one line of JSON; names that are not UTF-8 are escaped."""
    text = json.dumps(values, ensure_ascii=False)
    return json.dumps(values) if any("\ud800" <= c <= "\udfff" for c in text) else text


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    # Imported here so that `--help` and errors in options are fast.
    from afa.retrieval.search import Searcher

    results = (chosen.run, chosen.index, chosen.sheets)
    queries = images(chosen.images, [path for path in results if path is not None])
    searcher = Searcher.load(chosen.run, chosen.index)
    answers = searcher.search(
        queries, chosen.results, chosen.sheets, chosen.false_matches, chosen.rerank
    )
    for answer in answers:
        if chosen.json:
            print(_json(answer.to_json()), flush=True)
            continue
        shown = answer.sheet or f"no image: {answer.without_sheet}"
        print(printable(f"{answer.query}  ->  {shown}"))
        if answer.match is False:
            share = f"{100 * chosen.false_matches:g} % of unknown objects"
            print(
                f"  no match: the best score is below {answer.threshold:.3f}, which {share} reach"
            )
        for rank, hit in enumerate(answer.hits, start=1):
            print(printable(f"  {rank:>2}  {hit.score:6.3f}  {hit.id}  ({hit.class_name})"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
