"""What re-ranking gains with a trained run: `python -m experiments.rerank --run=DIR`.

Describes the pictures of the run's data set, fits whitening on training classes, chooses every
method's settings on validation classes, and prints its gain and cost on the test classes.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.errors import UserError
from experiments.run import guarded, quiet
from experiments.search import Parser

PROGRAM = "python -m experiments.rerank"


def parser() -> Parser:
    """The command's options."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    add = options.add_argument
    add("--run", required=True, type=Path, help="directory of a finished run")
    add("--protocol", choices=("leave_one_out", "catalogue"), default="leave_one_out",
        help="of the test queries (default: leave_one_out)")  # fmt: skip
    options.add_out()
    return options


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return guarded(lambda: _main(sys.argv[1:] if words is None else words))


def _main(words: Sequence[str]) -> int:
    chosen = parser().parse_args(list(words))
    quiet()
    from afa import parallel
    from afa.data import sets
    from afa.evaluation import reranking
    from afa.evaluation.protocols import protocols
    from afa.report.progress import table
    from afa.report.writers import write_json
    from afa.retrieval.search import Searcher

    parallel.keep_memory()
    searcher = Searcher.load(chosen.run)
    dataset = sets.load(searcher.config.data)
    allowed = [each.name for each in protocols(dataset.test)]
    if chosen.protocol not in allowed:
        raise UserError(f"--protocol={chosen.protocol}: the test split allows {', '.join(allowed)}")
    splits = {}
    for name, images in dataset.splits.items():
        print(f"describing {len(images)} {name} pictures", file=sys.stderr)
        splits[name] = reranking.Split(images, searcher.describe(images))
    lines = reranking.study(splits, chosen.protocol, lambda text: print(text, file=sys.stderr))
    columns = ["method", "settings", "R@1 %", "MAP@R %", "gain", "p", "ms a query", "s to prepare"]
    table(f"{dataset.name}, {chosen.protocol}: test classes", [_row(one) for one in lines], columns)
    if chosen.out:
        figures = [_figures(one) for one in lines]
        write_json(chosen.out, {"data": dataset.name, "protocol": chosen.protocol,
                                "hardware": parallel.platform(), "lines": figures})  # fmt: skip
    return 0


def _row(line: Any) -> list[Any]:
    means = line.metrics.means
    settings = ", ".join(f"{name} {value:g}" for name, value in line.settings.items())
    gain = f"{100 * line.gain.mean:+.1f} [{100 * line.gain.low:+.1f}, {100 * line.gain.high:+.1f}]"
    return [line.method, settings, means["recall_at_1"], means["map_at_r"], gain, f"{line.p:.4f}",
            f"{line.milliseconds:.3f}", f"{line.seconds:.2f}"]  # fmt: skip


def _figures(line: Any) -> dict[str, Any]:
    return dataclasses.asdict(line) | {"metrics": line.metrics.means}


if __name__ == "__main__":
    sys.exit(main())
