"""One run from images to report: data, training, evaluation, export, index, `report.html`.

Read `run` from top to bottom: it is the way of a run through the packages.
"""

import dataclasses
import datetime
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import afa
from afa import config as configuration
from afa import parallel
from afa.config import ExperimentConfig, with_changes
from afa.console import table
from afa.data.corruptions import held_back
from afa.data.pipeline import TrainPipeline, preprocessing, steps_per_epoch
from afa.data.sources import registry
from afa.data.types import Dataset, ImageSet
from afa.errors import UserError, choose
from afa.evaluation import evaluator as evaluator_module
from afa.evaluation import protocols, restoration
from afa.evaluation.evaluator import Evaluator, Results
from afa.evaluation.metrics import extra
from afa.losses.metric import LOSSES
from afa.models import embedder, pretrained
from afa.models.embedder import Networks
from afa.models.pretrained import Pretrained
from afa.report.page import write_report
from afa.retrieval import calibration
from afa.retrieval.indexing import address, indexed
from afa.retrieval.records import Records
from afa.runs import report_page
from afa.train import loop, optim, state, steps
from afa.train.checkpoint import Checkpoints, Position
from afa.train.logging import MetricWriter, write_result
from afa.train.state import TrainState, checkpoint_id
from afa.workdir import Workdir

CALIBRATED = 1000  # queries that tell what unknown objects score

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything of a run that does not change: built once, before anything is written."""

    config: ExperimentConfig
    dataset: Dataset
    pipeline: TrainPipeline
    plan: loop.Plan
    context: steps.StepContext
    pretrained: Pretrained | None

    @property
    def networks(self) -> Networks:
        return self.context.networks

    def fresh_state(self) -> TrainState:
        """The state before the first step, with the pretrained weights in it.

        Raises:
          UserError: they do not fit the backbone.
        """
        config = self.config
        fresh = state.create(
            self.networks, self.context.optimisers, config.seed, config.data.image_size
        )
        if (weights := self.pretrained) is None:
            return fresh
        return state.with_backbone(
            fresh, lambda own: pretrained.fill(own, weights, config.backbone)[0]
        )


def setup(config: ExperimentConfig) -> Setup:
    """Loads the data and builds modules, optimisers and plan.

    Raises:
      UserError: any mistake in configuration or data.
    """
    parallel.keep_memory()
    configuration.validate(config)
    weights = pretrained.read(config.backbone) if config.backbone.weights else None
    config = _with_preprocessing(config, weights)
    # Modules first: a misspelt name should not wait for the data.
    embedder.build(config, classes=2)
    choose("loss.name", config.loss.name, LOSSES)
    address(config.retrieval)  # an engine that is not there should not wait for the training
    dataset = registry.load(config.data)
    _check_fit(config, dataset)
    epoch = steps_per_epoch(dataset.train, config.data)
    plan = loop.plan(config, epoch)
    pipeline = TrainPipeline(
        dataset.train,
        config.data,
        config.seed,
        parallel.process_index(),
        parallel.process_count(),
        (plan.small, config.train.small_size),
        (plan.embedder_steps, configuration.generator_data(config))
        if plan.total > plan.embedder_steps
        else None,
    )
    networks = embedder.build(config, len(pipeline.classes))
    optimisers = optim.optimisers(config, plan.embedder_steps, max(plan.generator_steps, 1), epoch)
    context = steps.StepContext(networks, optimisers, config)
    ready = Setup(config, dataset, pipeline, plan, context, weights)
    if weights is not None:
        jax.eval_shape(ready.fresh_state)  # what does not fit is told before anything is written
    return ready


def _with_preprocessing(config: ExperimentConfig, weights: Pretrained | None) -> ExperimentConfig:
    """What the weights expect of an image, written into the configuration: a search does not have
    to read them again."""
    if weights is None:
        return config
    usual, chosen = weights.preprocessing, config.backbone
    filled = {
        f"backbone.{name}": getattr(chosen, name) or getattr(usual, name)
        for name in ("mean", "std", "channels")
    }
    return with_changes(config, **filled)


def _check_fit(config: ExperimentConfig, dataset: Dataset) -> None:
    """Checks settings against devices and data."""
    devices = parallel.device_count()
    for field in ("data.batch_size", "generator.batch_size"):
        size = configuration.flatten(config)[field]
        if size % devices:
            raise UserError(f"{field}={size} cannot be divided among {devices} devices")
    labels = dataset.test.labels
    for protocol in protocols.protocols(dataset.test, config.evaluation.protocol):
        if not np.isin(labels[protocol.queries], labels[protocol.gallery]).any():
            raise UserError(
                f"{dataset.name}: none of the {len(protocol.queries)} queries has an image of its "
                "class in the gallery"
            )
    count = len(gallery(dataset, config))
    if config.retrieval.results > count:
        raise UserError(
            f"retrieval.results={config.retrieval.results} is more than the {count} images of "
            f"the gallery (retrieval.gallery={config.retrieval.gallery!r})"
        )


def run(
    experiment: str, config: ExperimentConfig, workdir: Path, say: Say = print
) -> dict[str, Any]:
    """Trains, or goes on training, then evaluates, exports, indexes and reports.

    A finished run is only evaluated again.

    Returns:
      What `result.json` holds: config, commit, data, metrics, timings. Of several processes the
      first; the others return an empty one.

    Raises:
      UserError: a mistake of the user; nothing is half-written.
      TrainingDiverged, Preempted: see `afa.train.loop`.
    """
    timings = Timings()
    with timings.of("data"):
        ready = setup(config)
    config = ready.config
    home = Workdir(workdir)
    chief = parallel.process_index() == 0  # of several processes one writes
    with home.locked() if chief else nullcontext():
        if chief:
            home.claim(experiment, config)
            home.confirm(ready.dataset.fingerprint)
            home.confirm_weights(ready.pretrained.record() if ready.pretrained else None)
            registry.save_split(ready.dataset, home.split)
        for line in describe(ready):
            say(line)
        with timings.of("training"), Checkpoints(home.checkpoints, config.train.keep_best) as saved:
            trained, untrained, seconds = train(ready, home, saved, say)
        timings.seconds["training_steps"] = seconds
        if not chief:
            return {}
        trained = parallel.local(trained)
        return finish(experiment, ready, home, trained, untrained, timings, say)


def train(
    ready: Setup, home: Workdir, checkpoints: Checkpoints, say: Say
) -> tuple[TrainState, PyTree, float]:
    """The trained state, F's variables before training, and the seconds spent in steps."""
    fresh = ready.fresh_state()
    untrained = {"embedder": parallel.to_host(fresh.variables["embedder"])}
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
    return current, untrained, seconds


def finish(
    experiment: str,
    ready: Setup,
    home: Workdir,
    trained: TrainState,
    untrained: PyTree,
    timings: "Timings",
    say: Say,
) -> dict[str, Any]:
    """Evaluates, exports, indexes, writes the result and the report; returns the result."""
    config, dataset = ready.config, ready.dataset
    variables = trained.search_variables()
    evaluator = Evaluator(ready.networks, config, dataset)
    with timings.of("evaluation"):
        rows = evaluator.rows(variables)
        results = evaluator.test(variables, untrained, rows, say)
        restored = restoration.measure(evaluator.embedding, variables, dataset.test, config)
        for line in restoration.warnings(restored, config.data.corruptions):
            say(line)
    weights = rows[-1].weights
    with timings.of("export"):
        exported = gallery(dataset, config)
        embed = evaluator.embedding.fused(weights)
        vectors = embed(variables, exported)
        unknown_queries = unknown(dataset, config)
        calibrated = calibration.best_scores(
            embed(variables, unknown_queries), unknown_queries.labels, vectors, exported.labels
        )
        manifest = {
            "configuration": configuration.to_dict(config),
            "experiment": experiment,
            "checkpoint": checkpoint_id(trained),
            "step": int(trained.step),
            "preprocessing": preprocessing(config.data) | embedder.preprocessing_record(config),
            "backbone_weights": ready.pretrained.record() if ready.pretrained else None,
            "weights": weights,
            "training_classes": len(ready.pipeline.classes),
            "unknown": list(calibrated.scores),
        }
        classes = [dataset.class_names[label] for label in exported.labels]
        paths = [exported.path(i) for i in range(len(exported))]
        records = Records.of(vectors, exported.ids, classes, paths, exported.labels)
    with timings.of("index"):
        search = indexed(home.embeddings, config.retrieval, say, records, manifest)[1]
    result = {
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
        },
        "metrics": {"test": results.rows, "search": search, "restoration": restored},
        "timings": timings.seconds,
        "hardware": parallel.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parameters": parameters(trained),
        "backbone_weights": ready.pretrained.record() if ready.pretrained else None,
        "step": int(trained.step),
    }
    with timings.of("report"):
        page = report_page.page(experiment, result, evaluator, variables, weights, home.root)
        write_report(home.report, page)
    write_result(home.root, result, results.per_query)
    show(results, result, home, say)
    return result


def gallery(dataset: Dataset, config: ExperimentConfig) -> ImageSet:
    """The images that are exported and searched."""
    return dataset.test if config.retrieval.gallery == "test" else dataset.everything()


def unknown(dataset: Dataset, config: ExperimentConfig) -> ImageSet:
    """Images of validation classes that tell what an object scores that is not in the gallery."""
    images = dataset.validation
    wild = np.flatnonzero(~images.catalogue)
    return images.subset(protocols.drawn_evenly(images, wild, CALIBRATED, config.seed))


def describe(ready: Setup) -> list[str]:
    """The first lines of a run: on what, with what, for how long."""
    config, dataset, plan = ready.config, ready.dataset, ready.plan
    counts = ", ".join(
        f"{name} {len(images)} images of {len(images.classes)} classes"
        for name, images in dataset.splits.items()
    )
    stages = ", ".join(f"{s.name} {s.end - s.begin}" for s in loop.stages(ready.context, plan))
    lines = [
        f"hardware  {parallel.platform()}, {embedder.dtype_of(config.train.precision)}",
        f"data      {dataset.name}: {counts}",
        f"          {dataset.protocol}",
        f"network   {config.backbone.name}, {config.data.image_size} px, batch "
        f"{config.data.batch_size}",
        f"steps     {plan.total} ({stages})"
        + (f", the first {plan.small} at {config.train.small_size} px" if plan.small else ""),
    ]
    if ready.pretrained is not None:
        known = ready.pretrained
        lines.insert(
            4, f"weights   {known.source} ({known.names} names, sha256 {known.sha256[:12]})"
        )
    lines += [f"skipped   {each}" for each in dataset.skipped]
    return lines


def parameters(trained: TrainState) -> dict[str, int]:
    """Number of parameters of every network."""
    return {
        name: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(each["params"]))
        for name, each in trained.variables.items()
    }


def commit() -> str:
    """Commit of the code, with `+changes` where it differs from it; the version outside of git."""
    root = Path(afa.__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return f"afa {afa.__version__}"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"afa {afa.__version__}"


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


FIGURES = {
    "recall_at_1": "R@1",
    "recall_at_2": "R@2",
    "recall_at_4": "R@4",
    "recall_at_8": "R@8",
    "map_at_r": "MAP@R",
    "r_precision": "R-prec",
    "mean_average_precision": "mAP",
}
GROUPS = {"trained": "seen", "held_back": "unseen"}


def show(results: Results, result: Mapping[str, Any], home: Workdir, say: Say) -> None:
    """The final tables and where everything lies."""
    rows = results.rows
    protocols = [name for name in next(iter(rows.values())) if name not in ("cost", "weights")]
    columns = ["method", "cost", *(f"{each} %" for each in FIGURES.values())]
    columns += [f"{g} {FIGURES[m]} %" for g in GROUPS.values() for m in evaluator_module.SHORT]
    for protocol in protocols:
        lines = []
        for name, row in rows.items():
            found = row[protocol]
            lines.append(
                [name, None if row["cost"] is None else f"{row['cost']:.2f}"]
                + [found["clean"][each] for each in FIGURES]
                + [found[g].get(m) for g in GROUPS for m in evaluator_module.SHORT]
            )
        table(f"test classes, {protocol.replace('_', '-')}, exact search", lines, columns)
        if told := extra.told(rows["fused"][protocol]["further"]):
            say(f"fused     {told}")
    search, k = result["metrics"]["search"], result["config"]["retrieval"]["results"]
    say(
        f"search    {search['engine']}: recall@{k} {100 * search[f'recall_at_{k}']:.1f} % of exact "
        f"search, {search['queries_per_second']:,.0f} queries/s batched, "
        f"{search['single_queries_per_second']:,.0f} single"
    )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["timings"].items())
    say(f"timings   {seconds}")
    say(f"report    {home.report}")
    say(f"try       python -m experiments.search --run={home.root} YOUR_PICTURE.jpg")
