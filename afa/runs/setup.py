"""Builds and checks the parts of a run before anything is written."""

import dataclasses

import jax
import numpy as np

from afa import checks, parallel, runtime
from afa.config import ExperimentConfig, generator_data, with_changes
from afa.data.pipeline import TrainPipeline, steps_per_epoch
from afa.data.sources import registry
from afa.data.types import Dataset, ImageSet
from afa.errors import UserError
from afa.evaluation import protocols
from afa.models import pretrained
from afa.models.networks import Networks, build_networks, dtype_of
from afa.models.pretrained import Pretrained
from afa.retrieval.indexing import address
from afa.train import loop, optim, state, steps
from afa.train.state import TrainState

CALIBRATION_QUERIES = 1000  # unknown queries for the "no match" threshold


@dataclasses.dataclass(frozen=True)
class Setup:
    """The constant parts of a run.

    Attributes:
      config: configuration, with the preprocessing of the pretrained weights filled in.
      dataset: the data set.
      pipeline: training batches.
      plan: number of steps of each stage.
      context: networks, optimisers and configuration of the steps.
      pretrained: pretrained weights of the backbone; None for random weights.
    """

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
        """Creates the train state before the first step, with pretrained weights loaded.

        Raises:
          UserError: the weights do not fit the backbone.
        """
        config = self.config
        fresh = state.create(
            self.networks, self.context.optimisers, config.seed, config.data.image_size,
            config.loss, config.data.batch_size,
        )  # fmt: skip
        if (weights := self.pretrained) is None:
            return fresh
        return state.with_backbone(
            fresh, lambda own: pretrained.load_weights(own, weights, config.backbone)[0]
        )


def build_setup(config: ExperimentConfig) -> Setup:
    """Loads the data and builds networks, optimisers and plan.

    Raises:
      UserError: a mistake in configuration or data.
    """
    runtime.keep_memory()
    runtime.keep_programs()
    checks.validate(config)
    weights = pretrained.read(config.backbone)
    config = _with_preprocessing(config, weights)
    # Names and addresses are checked before the data is loaded, so that mistakes show at once.
    build_networks(config, classes=2)
    address(config.retrieval)
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
        (plan.embedder_steps, generator_data(config)) if plan.total > plan.embedder_steps else None,
    )
    networks = build_networks(config, len(pipeline.classes))
    optimisers = optim.optimisers(config, plan.embedder_steps, max(plan.generator_steps, 1), epoch)
    context = steps.StepContext(networks, optimisers, config)
    setup = Setup(config, dataset, pipeline, plan, context, weights)
    if weights is not None:
        jax.eval_shape(setup.fresh_state)  # raises if the weights do not fit the backbone
    return setup


def _with_preprocessing(config: ExperimentConfig, weights: Pretrained | None) -> ExperimentConfig:
    """Fills the preprocessing of the pretrained weights into the configuration, so that a search
    does not need the weights file."""
    if weights is None:
        return config
    default, backbone = weights.preprocessing, config.backbone
    fields = {
        f"backbone.{name}": getattr(backbone, name) or getattr(default, name)
        for name in ("mean", "std", "channels")
    }
    return with_changes(config, **fields)


def _check_fit(config: ExperimentConfig, dataset: Dataset) -> None:
    """Checks the configuration against devices and data."""
    devices = parallel.device_count()
    sizes = {
        "data.batch_size": config.data.batch_size,
        "generator.batch_size": config.generator.batch_size,
    }
    for field, size in sizes.items():
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


def gallery(dataset: Dataset, config: ExperimentConfig) -> ImageSet:
    """Returns the images that are exported and searched."""
    return dataset.test if config.retrieval.gallery == "test" else dataset.everything()


def unknown_queries(dataset: Dataset, config: ExperimentConfig) -> ImageSet:
    """Returns images of validation classes that calibrate the "no match" threshold."""
    images = dataset.validation
    wild = np.flatnonzero(~images.catalogue)
    return images.subset(protocols.drawn_evenly(images, wild, CALIBRATION_QUERIES, config.seed))


def describe(setup: Setup) -> list[str]:
    """Returns the first lines of the log: hardware, data, network, weights and steps."""
    config, dataset, plan = setup.config, setup.dataset, setup.plan
    counts = ", ".join(
        f"{name} {len(images)} images of {len(images.classes)} classes"
        for name, images in dataset.splits.items()
    )
    stages = ", ".join(f"{s.name} {s.end - s.begin}" for s in loop.stages(setup.context, plan))
    lines = [
        f"hardware  {parallel.platform()}, {dtype_of(config.train.precision)}",
        f"data      {dataset.name}: {counts}",
        f"          {dataset.protocol}",
        f"network   {config.backbone.name}, {config.data.image_size} px, batch "
        f"{config.data.batch_size}",
        f"steps     {plan.total} ({stages})"
        + (f", the first {plan.small} at {config.train.small_size} px" if plan.small else ""),
    ]
    if setup.pretrained is not None:
        weights = setup.pretrained
        lines[4:4] = [
            f"weights   {weights.source} ({weights.names} names, sha256 {weights.sha256[:12]})",
            *(f"          {line}" for line in weights.notes),
        ]
    lines += [f"skipped   {each}" for each in dataset.skipped]
    return lines
