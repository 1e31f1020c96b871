"""What a run is made of, built and checked before anything is written."""

import dataclasses

import jax
import numpy as np

from afa import checks, parallel, runtime
from afa.config import ExperimentConfig, with_changes
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

CALIBRATION_QUERIES = 1000  # that tell what unknown objects score


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
            self.networks, self.context.optimisers, config.seed, config.data.image_size, config.loss
        )
        if (weights := self.pretrained) is None:
            return fresh
        return state.with_backbone(
            fresh, lambda own: pretrained.load_weights(own, weights, config.backbone)[0]
        )


def setup(config: ExperimentConfig) -> Setup:
    """Loads the data and builds modules, optimisers and plan.

    Raises:
      UserError: any mistake in configuration or data.
    """
    runtime.keep_memory()
    checks.validate(config)
    weights = pretrained.read(config.backbone)
    config = _with_preprocessing(config, weights)
    # Modules first: a misspelt name should not wait for the data.
    build_networks(config, classes=2)
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
    )
    networks = build_networks(config, len(pipeline.classes))
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
    devices, size = parallel.device_count(), config.data.batch_size
    if size % devices:
        raise UserError(f"data.batch_size={size} cannot be divided among {devices} devices")
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
    """The images that are exported and searched."""
    return dataset.test if config.retrieval.gallery == "test" else dataset.everything()


def unknown_queries(dataset: Dataset, config: ExperimentConfig) -> ImageSet:
    """Images of validation classes that tell what an object scores that is not in the gallery."""
    images = dataset.validation
    wild = np.flatnonzero(~images.catalogue)
    return images.subset(protocols.drawn_evenly(images, wild, CALIBRATION_QUERIES, config.seed))


def describe(ready: Setup) -> list[str]:
    """The first lines of a run: on what, with what, for how long."""
    config, dataset, plan = ready.config, ready.dataset, ready.plan
    counts = ", ".join(
        f"{name} {len(images)} images of {len(images.classes)} classes"
        for name, images in dataset.splits.items()
    )
    stages = ", ".join(f"{s.name} {s.end - s.begin}" for s in loop.stages(ready.context, plan))
    lines = [
        f"hardware  {parallel.platform()}, {dtype_of(config.train.precision)}",
        f"data      {dataset.name}: {counts}",
        f"          {dataset.protocol}",
        f"network   {config.backbone.name}, {config.data.image_size} px, batch "
        f"{config.data.batch_size}",
        f"steps     {plan.total} ({stages})"
        + (f", the first {plan.small} at {config.train.small_size} px" if plan.small else ""),
    ]
    if ready.pretrained is not None:
        known = ready.pretrained
        lines[4:4] = [
            f"weights   {known.source} ({known.names} names, sha256 {known.sha256[:12]})",
            *(f"          {line}" for line in known.notes),
        ]
    lines += [f"skipped   {each}" for each in dataset.skipped]
    return lines
