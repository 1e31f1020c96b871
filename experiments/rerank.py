"""Measures the gain of re-ranking with a trained run: `python -m experiments.rerank --run=DIR`.

Embeds the images of the run's data set, fits whitening on training classes, chooses the settings of
every method on validation classes, and prints gain and cost on test classes. Queries are never in
the searched gallery, because methods that prepare the gallery would use them. Costs are
milliseconds to embed a query (in a batch), milliseconds to rank the gallery for it, and seconds to
prepare the gallery. The chosen settings are stored with the run and used by
`experiments.search --rerank=NAME`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.errors import UserError
from experiments.cli import Parser, note, perform

PROGRAM = "python -m experiments.rerank"
LARGEST_SCALE = 8.0  # images of larger scales may not fit in memory


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    add = options.add_argument
    add("--run", required=True, type=Path, help="directory of a finished run")
    add("--protocol", default=None,
        help="protocol of the test queries; halves: half of the images of every class are searched "
        "among the others (default: the first that the test split supports)")  # fmt: skip
    add("--methods", type=_listed, default=None, metavar="A,B",
        help="such as alpha_query_expansion,geometric_verification (default: all)")  # fmt: skip
    add("--scales", type=_scales, default=(1.0,), metavar="A,B",
        help="image scales; all methods start from the mean descriptors over them, such as "
        "1,0.7,0.5 (default: 1)")  # fmt: skip
    add("--queries", type=int, default=0, metavar="N",
        help="validation and test queries, drawn evenly over classes (default: all)")  # fmt: skip
    options.add_out()
    return options


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",")]


def _scales(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(each) for each in _listed(text))
    except ValueError:
        found = ()
    if not found or not all(0 < each <= LARGEST_SCALE for each in found):
        allowed = f"numbers above 0 and up to {LARGEST_SCALE:g}, such as 1,0.7"
        raise argparse.ArgumentTypeError(f"{text!r}: {allowed}")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    if chosen.queries < 0:
        raise UserError(f"--queries={chosen.queries} must not be negative")
    from afa import parallel, runtime
    from afa.console import table
    from afa.data.sources import registry
    from afa.evaluation import reranking
    from afa.inference.embed import Embedding
    from afa.inference.load import TrainedEmbedder
    from afa.io import write_json
    from afa.models.networks import build_networks
    from afa.retrieval.rerank import serving
    from afa.workdir import Workdir

    names = reranking.NAMES if chosen.methods is None else reranking.chosen(chosen.methods)
    runtime.keep_memory()
    embedder = TrainedEmbedder.load(chosen.run)
    dataset = registry.load(embedder.config.data)
    protocol = _protocol(chosen.protocol, dataset.test)
    networks = build_networks(embedder.config, embedder.record["training_classes"])
    config = embedder.config
    embedding = Embedding(networks, config.backbone.name, config.data, config.evaluation)
    model = embedding, embedder.variables, embedder.fusion
    splits = {}
    for name, images in dataset.splits.items():
        if name == "train" and not set(reranking.WHITENING) & set(names):
            continue
        note(f"embedding {len(images)} {name} images")
        # Training images are used for whitening, which needs only their descriptors.
        needed = () if name == "train" else names
        splits[name] = reranking.embed_split(*model, images, needed, chosen.scales)
    lines = reranking.study(splits, protocol, note, names, chosen.queries)
    Workdir(chosen.run).count_test_read("rerank")
    table(f"{dataset.name}, {protocol}: test classes", [_row(one) for one in lines], COLUMNS)
    if chosen.scales == (1.0,):
        saved = serving.save(chosen.run, {line.method: line.settings for line in lines})
        if saved:
            note(f"experiments.search --rerank=NAME can now use {', '.join(saved)}")
    if chosen.out:
        figures = [_figures(one) for one in lines]
        write_json(chosen.out, {
            "data": dataset.name, "protocol": protocol, "queries": lines[0].metrics.queries,
            "hardware": parallel.platform(), "lines": figures,
        })  # fmt: skip
    return 0


def _protocol(name: str | None, images: Any) -> str:
    from afa.evaluation.reranking import supported_protocols

    allowed = supported_protocols(images)
    if name is not None and name not in allowed:
        raise UserError(f"--protocol={name!r}: the test split supports {', '.join(allowed)}")
    return name or allowed[0]


COLUMNS = ["method", "settings", "validation MAP@R %", "R@1 %", "MAP@R %", "gain", "p",
           "ms to embed", "ms to rank", "s to prepare"]  # fmt: skip


def _row(line: Any) -> list[Any]:
    means = line.metrics.means
    settings = ", ".join(f"{name} {_text(value)}" for name, value in line.settings.items())
    gain = f"{100 * line.gain.mean:+.1f} [{100 * line.gain.low:+.1f}, {100 * line.gain.high:+.1f}]"
    return [line.method, settings, line.validation, means["recall_at_1"], means["map_at_r"], gain,
            f"{line.p:.4f}", f"{line.embed_milliseconds:.1f}", f"{line.milliseconds:.3f}",
            f"{line.seconds:.2f}"]  # fmt: skip


def _text(value: Any) -> str:
    return "/".join(f"{each:g}" for each in value) if isinstance(value, tuple) else f"{value:g}"


def _figures(line: Any) -> dict[str, Any]:
    return dataclasses.asdict(line) | {"metrics": line.metrics.means}


if __name__ == "__main__":
    sys.exit(main())
