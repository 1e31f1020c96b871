"""The baseline beside pytorch-metric-learning: `python -m experiments.benchmarks.metric_learning`.

    python -m experiments.benchmarks.metric_learning --runs runs/baseline-0 runs/baseline-1

For every given run of a baseline, trains the same network in PyTorch with the normalised softmax of
pytorch-metric-learning: same initial weights, batches, steps, optimiser, schedule and moving
average. Both are searched by their global descriptor, exactly, on the test classes of the run.
Needs the extra `bench`.
"""

import argparse
import importlib.util
import json
import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afa.errors import UserError
from experiments.cli import Parser, note, perform

if TYPE_CHECKING:
    from afa.config import ExperimentConfig
    from afa.runs.setup import Setup

PROGRAM = "python -m experiments.benchmarks.metric_learning"
METRICS = ("recall_at_1", "map_at_r")
LAYOUT = "channels_last"
BATCH = 128  # images embedded at once
# What the peer has as well; other values have no counterpart in it.
NEEDED = {
    "adversarial.enabled": False,
    "loss.name": "norm_softmax",
    "train.consistency": 0,
    "optim.name": "adamw",
    "optim.backbone_rate": 1,
    "optim.head_warmup": "0",
    "optim.sam_radius": 0,
    "optim.accumulate": 1,
    "backbone.stem": "imagenet",
    "backbone.frozen_stages": 0,
    "backbone.frozen_norm": False,
}


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    options.add_argument("--runs", nargs="+", required=True, type=Path, metavar="RUN",
                         help="finished runs of a baseline, of different seeds")  # fmt: skip
    options.add_out()
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    for name in ("torch", "pytorch_metric_learning"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; install the extra `bench`")
    from afa import parallel, runtime
    from afa.console import table
    from afa.evaluation.statistics import mean_and_interval
    from afa.io import write_json
    from afa.runs import compare
    from afa.workdir import Workdir

    runtime.keep_memory()
    compare.load(chosen.runs)  # refuses what is not finished, and a run that is given twice
    workdirs = [Workdir(path) for path in chosen.runs]
    found: dict[str, dict[str, list[float]]] = {"afa": {}, "peer": {}, "difference": {}}
    for ours, setup in [_finished(each) for each in workdirs]:
        note(f"seed {setup.config.seed}: {setup.plan.total} steps of the peer")
        peer = train_peer(setup)
        for metric in METRICS:
            values = {"afa": ours[metric], "peer": peer[metric]}
            values["difference"] = values["afa"] - values["peer"]
            for name, value in values.items():
                found[name].setdefault(metric, []).append(value)
    names = {"afa": "afa, F", "peer": "pytorch-metric-learning", "difference": "difference"}
    rows = []
    for name, metrics in found.items():
        row: list[Any] = [names[name]]
        for values in metrics.values():
            row += mean_and_interval(values) if len(values) > 1 else [values[0], None]
        rows.append(row)
    seeds = "1 seed" if len(workdirs) == 1 else f"{len(workdirs)} seeds"
    table(f"test classes, {seeds}", rows,
          ("baseline", "R@1 %", "± 95 % of R@1", "MAP@R %", "± 95 % of MAP@R"))  # fmt: skip
    if chosen.out:
        runs = [str(each.root) for each in workdirs]
        write_json(chosen.out, {"hardware": parallel.platform(), "runs": runs, "found": found})
    return 0


def _finished(workdir: Any) -> "tuple[dict[str, float], Setup]":
    """Returns the figures of a run and its parts.

    Raises:
      UserError: its training has no counterpart in the peer.
    """
    from afa.evaluation.protocols import protocols
    from afa.runs.setup import build_setup

    config = workdir.stored()[1]
    _check(workdir.root, config)
    setup = build_setup(config)
    protocol = protocols(setup.dataset.test, config.evaluation.protocol)[0]
    table = json.loads(workdir.result.read_text("utf-8"))["metrics"]["test"]
    return table["F"][protocol.name]["clean"], setup


def _check(run: Path, config: "ExperimentConfig") -> None:
    from afa.models.backbones.resnet import ResNet
    from afa.models.networks import build_backbone

    for name, needed in NEEDED.items():
        if (value := operator.attrgetter(name)(config)) != needed:
            raise UserError(f"--runs: {run} has {name}={value!r}, and the peer only {needed!r}")
    if not isinstance(build_backbone(config), ResNet):
        raise UserError(f"--runs: {run} has backbone.name={config.backbone.name!r}; the peer is a "
                        "ResNet")  # fmt: skip


def train_peer(setup: "Setup") -> dict[str, float]:
    """Trains the peer on the batches of a run; returns its metrics on the test classes."""
    import torch
    from pytorch_metric_learning import losses

    from afa.data.pipeline import eval_batches, steps_per_epoch
    from afa.evaluation.evaluator import ranked_metrics
    from afa.evaluation.protocols import protocols
    from afa.train.optim import learning_rate
    from experiments.benchmarks.torch_twin import OneDescriptor, Trainer, Twin, load_flax_params
    from experiments.benchmarks.training import dotted

    config, dataset, classes = setup.config, setup.dataset, len(setup.pipeline.classes)
    torch.manual_seed(config.seed)
    params = dotted(setup.fresh_state().variables["embedder"]["params"])
    twin = load_flax_params(Twin(config, classes), params)
    loss = losses.NormalizedSoftmaxLoss(
        classes, config.embedder.embedding_dim, temperature=config.loss.posterior_temperature
    )
    epoch = steps_per_epoch(dataset.train, config.data)
    schedule = learning_rate(config.optim, config.optim.learning_rate, setup.plan.total, epoch)
    model = OneDescriptor(twin, loss)
    trainer = Trainer(config, model, LAYOUT, lambda step: float(np.asarray(schedule(step))))
    for batch in setup.pipeline.iterate(0, setup.plan.total):
        trainer.step({name: batch[name] for name in ("image", "label")})
    trainer.use_average()
    images = dataset.test
    with torch.inference_mode():
        vectors = np.concatenate([
            model.describe(trainer.prepared(torch.from_numpy(batch).to(trainer.device)))
            .float().cpu().numpy()
            for batch in eval_batches(images, config.data, BATCH)
        ])  # fmt: skip
    protocol = protocols(images, config.evaluation.protocol)[0]
    means = ranked_metrics(
        vectors[protocol.queries], vectors[protocol.gallery], images, protocol
    ).means
    return {metric: means[metric] for metric in METRICS}


if __name__ == "__main__":
    sys.exit(main())
