"""One run from images to report: read `run` from top to bottom."""

import datetime
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from afa import __version__, parallel
from afa import config as configuration
from afa.config import ExperimentConfig
from afa.data.corruptions import held_back
from afa.data.pipeline import preprocessing
from afa.data.sources import registry
from afa.evaluation import restoration
from afa.evaluation.evaluator import Evaluator, Results
from afa.models.networks import preprocessing_record
from afa.report.page import Page, write_report
from afa.retrieval import calibration
from afa.retrieval.indexing import indexed
from afa.retrieval.records import Records
from afa.runs import report_page
from afa.runs.setup import Setup, describe, gallery, setup, unknown_queries
from afa.runs.tables import show
from afa.train import loop
from afa.train.checkpoint import Checkpoints, Position
from afa.train.logging import MetricWriter, write_result
from afa.train.state import TrainState, checkpoint_id
from afa.workdir import Workdir

Say = Callable[[str], None]


def run(
    experiment: str, config: ExperimentConfig, workdir: Path, say: Say = print
) -> dict[str, Any]:
    """Trains, or goes on training, then evaluates, exports, indexes and reports.

    A finished run is only evaluated again.

    Returns:
      What `result.json` holds: config, commit, data, metrics, timings. Several processes train,
      embed and end together; the first writes, and the others return an empty result.

    Raises:
      UserError: a mistake of the user; nothing is half-written.
      TrainingDiverged, Preempted: see `afa.train.loop`.
    """
    timings = Timings()
    with timings.of("data"):
        ready = parallel.together(lambda: setup(config))
    config = ready.config
    home = Workdir(workdir)
    with ExitStack() as stack:
        parallel.first_only(lambda: stack.enter_context(home.locked()))
        parallel.first_only(lambda: claim(experiment, ready, home))
        for line in describe(ready):
            say(line)
        with timings.of("training"), Checkpoints(home.checkpoints, config.train.keep_best) as saved:
            trained, initial, seconds = train(ready, home, saved, say)
        timings.seconds["training_steps"] = seconds
        trained = parallel.local(trained)
        variables = trained.search_variables()
        evaluator = Evaluator(ready.networks, config, ready.dataset)
        with timings.of("evaluation"):
            results, weights = evaluate(evaluator, variables, initial, say)
            restored = restoration.measure(
                evaluator.embedding, variables, ready.dataset.test, config
            )
            for line in restoration.warnings(restored, config.data.corruptions):
                say(line)
        with timings.of("export"):
            records, manifest = export(experiment, ready, evaluator, trained, weights)
        with timings.of("index"):
            measured = parallel.first_only(
                lambda: indexed(home.embeddings, config.retrieval, say, records, manifest)[1]
            )
            search = parallel.from_first(measured)
        result = collect(experiment, ready, trained, results, restored, search, timings.seconds)
        with timings.of("report"):
            page = report_page.page(experiment, result, evaluator, variables, weights, home.root)
        parallel.first_only(lambda: write(home, result, results, page))
        show(results, result, home, say)
        parallel.end_together("run")
    return result if parallel.process_index() == 0 else {}


def claim(experiment: str, ready: Setup, home: Workdir) -> None:
    """Makes the directory that of this run, or confirms that it is.

    Raises:
      UserError: it holds another run, or a run on other images or weights.
    """
    home.claim(experiment, ready.config)
    home.confirm(ready.dataset.fingerprint)
    home.confirm_weights(ready.pretrained.record() if ready.pretrained else None)
    registry.save_split(ready.dataset, home.split)


def write(home: Workdir, result: Mapping[str, Any], results: Results, page: Page) -> None:
    """Writes the report, the table of queries and, last, `result.json`."""
    write_report(home.report, page)
    write_result(home.root, result, results.per_query)


def train(
    ready: Setup, home: Workdir, checkpoints: Checkpoints, say: Say
) -> tuple[TrainState, PyTree, float]:
    """The trained state, F's variables before training, and the seconds spent in steps."""
    fresh = ready.fresh_state()
    initial = {"embedder": parallel.to_host(fresh.variables["embedder"])}
    position = Position(0, 0.0)
    current = parallel.replicate(fresh)
    if (step := checkpoints.latest()) is not None:
        current, position = checkpoints.restore(fresh, ready.config)
        finished = step >= ready.plan.total
        say(
            f"{home.root} is finished ({step} steps); it is evaluated again"
            if finished
            else f"going on after step {step} of {ready.plan.total}"
        )
    seconds = position.train_seconds
    if position.batch < ready.plan.total:
        evaluator = Evaluator(ready.networks, ready.config, ready.dataset)
        chief = parallel.process_index() == 0

        def validate(now: TrainState) -> Mapping[str, float]:
            local = parallel.local(now)
            has_generator = int(local.updates.get("generator", 0)) > 0
            return evaluator.validation(local.search_variables(), has_generator)

        with MetricWriter(home.root, position.batch) if chief else nullcontext() as writer:
            current, seconds = loop.train(
                ready.context, ready.plan, current, position, ready.pipeline, checkpoints, writer,
                validate,
            )  # fmt: skip
    if ready.config.evaluation.checkpoint == "best" and (best := checkpoints.best()) is not None:
        say(f"evaluating the best checkpoint, step {best}")
        current, _ = checkpoints.restore(fresh, ready.config, best)
    return current, initial, seconds


def evaluate(
    evaluator: Evaluator, variables: PyTree, initial: PyTree, say: Say
) -> tuple[Results, dict[str, float]]:
    """The table of test classes, and the weights of the fused descriptor."""
    variants = evaluator.variants(variables, initial)
    return evaluator.test(variables, initial, variants, say), dict(variants[-1].weights)


def export(
    experiment: str,
    ready: Setup,
    evaluator: Evaluator,
    trained: TrainState,
    weights: Mapping[str, float],
) -> tuple[Records, dict[str, Any]]:
    """The gallery as rows of an index, and the manifest that says what described them."""
    config, dataset = ready.config, ready.dataset
    variables, images = trained.search_variables(), gallery(dataset, config)
    embed = evaluator.embedding.fused(weights)
    vectors = evaluator.embedding.fused(weights, "gallery")(variables, images)
    unknown = unknown_queries(dataset, config)
    scores = calibration.best_scores(
        embed(variables, unknown), unknown.labels, vectors, images.labels
    )
    manifest = {
        "configuration": configuration.to_dict(config),
        "experiment": experiment,
        "checkpoint": checkpoint_id(trained),
        "step": int(trained.step),
        "preprocessing": preprocessing(config.data) | preprocessing_record(config),
        "backbone_weights": ready.pretrained.record() if ready.pretrained else None,
        "weights": dict(weights),
        "training_classes": len(ready.pipeline.classes),
        "unknown": list(scores.scores),
    }
    classes = [dataset.class_names[label] for label in images.labels]
    paths = [images.path(i) for i in range(len(images))]
    return Records.of(vectors, images.ids, classes, paths, images.labels), manifest


def collect(
    experiment: str,
    ready: Setup,
    trained: TrainState,
    results: Results,
    restored: Mapping[str, Any],
    search: Mapping[str, Any],
    timings: Mapping[str, float],
) -> dict[str, Any]:
    """What `result.json` holds. `timings` still grows: it is stored as it is when written."""
    config, dataset = ready.config, ready.dataset
    return {
        "config": {"experiment": experiment, **configuration.to_dict(config)},
        "commit": commit(),
        "data": {
            "name": dataset.name,
            "protocol": dataset.protocol,
            "fingerprint": dataset.fingerprint,
            "test_fingerprint": dataset.test_fingerprint,
            "skipped": list(dataset.skipped),
            "images": {name: len(images) for name, images in dataset.splits.items()},
            "classes": {name: len(images.classes) for name, images in dataset.splits.items()},
            "held_back_corruptions": list(held_back(config.data.corruptions)),
            "corruption_seed": config.evaluation.corruption_seed,
        },
        "metrics": {"test": results.variants, "search": search, "restoration": restored},
        "timings": timings,
        "hardware": parallel.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parameters": parameters(trained),
        "backbone_weights": ready.pretrained.record() if ready.pretrained else None,
        "step": int(trained.step),
    }


def parameters(trained: TrainState) -> dict[str, int]:
    """Number of parameters of every network."""
    return {
        name: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(each["params"]))
        for name, each in trained.variables.items()
    }


def commit() -> str:
    """Commit of the code, with `+changes` where it differs from it; the version outside of git."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return f"afa {__version__}"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"afa {__version__}"


class Timings:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(time.perf_counter() - began, 3)
