"""A run: training, evaluation, export, index and report."""

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
from afa.models.fusion import Fusion
from afa.models.networks import preprocessing_record
from afa.report.page import Page, write_report
from afa.retrieval import calibration
from afa.retrieval.indexing import indexed
from afa.retrieval.records import Records
from afa.runs import report_page
from afa.runs.setup import Setup, build_setup, describe, gallery, unknown_queries
from afa.runs.tables import show
from afa.train import loop
from afa.train.checkpoint import Checkpoints, Position
from afa.train.logging import MetricWriter, write_result
from afa.train.state import TrainState, checkpoint_id
from afa.workdir import Workdir

PrintLine = Callable[[str], None]


def run(
    experiment: str, config: ExperimentConfig, directory: Path, print_line: PrintLine = print
) -> dict[str, Any]:
    """Trains a run or resumes it, then evaluates, exports, indexes and reports.

    A run whose training is finished is only evaluated again.

    Args:
      experiment: name of the experiment.
      config: its configuration.
      directory: of the run.
      print_line: receives the lines of the log.

    Returns:
      The content of `result.json`: config, commit, data, metrics, timings. Several processes train,
      embed and end together; the first writes and returns it, the others return {}.

    Raises:
      UserError: a mistake of the user; nothing is half-written.
      TrainingDiverged, Preempted: see `afa.train.loop`.
    """
    timings = Timings()
    with timings.of("data"):
        setup = parallel.together(lambda: build_setup(config))
    config = setup.config
    workdir = Workdir(directory)
    with ExitStack() as stack:
        parallel.first_only(lambda: stack.enter_context(workdir.locked()))
        parallel.first_only(lambda: claim(experiment, setup, workdir))
        for line in describe(setup):
            print_line(line)
        keep_best = config.train.keep_best
        with timings.of("training"), Checkpoints(workdir.checkpoints, keep_best) as checkpoints:
            state, initial, seconds = train(setup, workdir, checkpoints, print_line)
        timings.seconds["training_steps"] = seconds
        state = parallel.local(state)
        variables = state.search_variables()
        evaluator = Evaluator(setup.networks, config, setup.dataset)
        with timings.of("evaluation"):
            results, fusion = evaluate(evaluator, variables, initial, print_line)
            restored = restoration.measure(
                evaluator.embedding, variables, setup.dataset.test, config
            )
            for line in restoration.warnings(restored, config.data.corruptions):
                print_line(line)
        with timings.of("export"):
            records, manifest = export(experiment, setup, evaluator, state, fusion)
        with timings.of("index"):
            arguments = workdir.embeddings, config.retrieval, print_line, records, manifest
            measured = parallel.first_only(lambda: indexed(*arguments)[1])
            search = parallel.from_first(measured)
        result = collect(experiment, setup, state, results, restored, search, timings.seconds)
        with timings.of("report"):
            page = report_page.page(experiment, result, evaluator, variables, fusion, workdir.root)
        parallel.first_only(lambda: write(workdir, result, results, page))
        show(results, result, workdir, print_line)
        parallel.end_together("run")
    return result if parallel.process_index() == 0 else {}


def claim(experiment: str, setup: Setup, workdir: Workdir) -> None:
    """Claims the directory for this run, or confirms that it belongs to it.

    Raises:
      UserError: the directory holds another run, or a run on other images or weights.
    """
    workdir.claim(experiment, setup.config)
    workdir.confirm(setup.dataset.fingerprint)
    workdir.confirm_weights(setup.pretrained.record() if setup.pretrained else None)
    registry.save_split(setup.dataset, workdir.split)


def write(workdir: Workdir, result: Mapping[str, Any], results: Results, page: Page) -> None:
    """Writes the report, the per-query table and, last, `result.json`."""
    write_report(workdir.report, page)
    workdir.count_test_read("run")
    write_result(workdir.root, result, results.per_query)


def train(
    setup: Setup, workdir: Workdir, checkpoints: Checkpoints, print_line: PrintLine
) -> tuple[TrainState, PyTree, float]:
    """Trains a run, from its latest checkpoint if it has one.

    Returns:
      The train state to evaluate, F's variables before training, and the seconds spent in steps.
    """
    fresh = setup.fresh_state()
    initial = {"embedder": parallel.to_host(fresh.variables["embedder"])}
    position = Position(0, 0.0)
    state = parallel.replicate(fresh)
    if (step := checkpoints.latest()) is not None:
        state, position = checkpoints.restore(fresh, setup.config)
        finished = step >= setup.plan.total
        print_line(
            f"{workdir.root} is finished ({step} steps); it is evaluated again"
            if finished
            else f"resuming after step {step} of {setup.plan.total}"
        )
    seconds = position.train_seconds
    if position.batch < setup.plan.total:
        evaluator = Evaluator(setup.networks, setup.config, setup.dataset)
        is_main_process = parallel.process_index() == 0

        def validate(current: TrainState) -> Mapping[str, float]:
            local = parallel.local(current)
            has_generator = int(local.updates.get("generator", 0)) > 0
            return evaluator.validation(local.search_variables(), has_generator)

        writing = MetricWriter(workdir.root, position.batch) if is_main_process else nullcontext()
        with writing as writer:
            state, seconds = loop.train(
                setup.context, setup.plan, state, position, setup.pipeline, checkpoints, writer,
                validate,
            )  # fmt: skip
    if setup.config.evaluation.checkpoint == "best" and (best := checkpoints.best()) is not None:
        print_line(f"evaluating the best checkpoint, step {best}")
        state, _ = checkpoints.restore(fresh, setup.config, best)
    return state, initial, seconds


def evaluate(
    evaluator: Evaluator, variables: PyTree, initial: PyTree, print_line: PrintLine
) -> tuple[Results, Fusion]:
    """Evaluates all variants on the test classes.

    Returns:
      The results, and the fusion of the variant "fused".
    """
    variants = evaluator.variants(variables, initial)
    return evaluator.test(variables, initial, variants, print_line), variants[-1].fusion


def export(
    experiment: str,
    setup: Setup,
    evaluator: Evaluator,
    state: TrainState,
    fusion: Fusion,
) -> tuple[Records, dict[str, Any]]:
    """Embeds the gallery.

    Returns:
      The gallery as rows of an index, and the manifest of the networks that embedded it.
    """
    config, dataset = setup.config, setup.dataset
    variables, images = state.search_variables(), gallery(dataset, config)
    embed = evaluator.embedding.fused(fusion)
    vectors = evaluator.embedding.fused(fusion, "gallery")(variables, images)
    unknown = unknown_queries(dataset, config)
    scores = calibration.best_scores(
        embed(variables, unknown), unknown.labels, vectors, images.labels
    )
    manifest = {
        "configuration": configuration.to_dict(config),
        "experiment": experiment,
        "checkpoint": checkpoint_id(state),
        "step": int(state.step),
        "preprocessing": preprocessing(config.data) | preprocessing_record(config),
        "backbone_weights": setup.pretrained.record() if setup.pretrained else None,
        "fusion": fusion.to_json(),
        "training_classes": len(setup.pipeline.classes),
        "unknown": list(scores.scores),
    }
    classes = [dataset.class_names[label] for label in images.labels]
    paths = [images.path(i) for i in range(len(images))]
    return Records.of(vectors, images.ids, classes, paths, images.labels), manifest


def collect(
    experiment: str,
    setup: Setup,
    state: TrainState,
    results: Results,
    restored: Mapping[str, Any],
    search: Mapping[str, Any],
    timings: Mapping[str, float],
) -> dict[str, Any]:
    """Collects the content of `result.json`.

    `timings` is not copied, because more entries are added before the result is written.
    """
    config, dataset = setup.config, setup.dataset
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
        "parameters": parameters(state),
        "backbone_weights": setup.pretrained.record() if setup.pretrained else None,
        "step": int(state.step),
    }


def parameters(state: TrainState) -> dict[str, int]:
    """Counts the parameters of every network."""
    return {
        name: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(each["params"]))
        for name, each in state.variables.items()
    }


def commit() -> str:
    """Git commit of the code, with `+changes` if files differ; outside git the version."""
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
    """Measures the seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Measures the time spent in a `with` block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(time.perf_counter() - began, 3)
