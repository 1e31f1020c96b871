"""Loads the networks of a finished run to embed images as the run embedded its gallery."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, PyTree

from afa import config as configuration
from afa.config import ExperimentConfig
from afa.data.pipeline import preprocessing
from afa.data.types import ImageSet, RawImage
from afa.errors import UserError
from afa.inference.embed import Embedding
from afa.manifest import OWN_FIELDS, read_manifest
from afa.models.networks import build_networks, preprocessing_record
from afa.train import optim, state
from afa.train.checkpoint import Checkpoints
from afa.train.state import TrainState, checkpoint_id
from afa.workdir import Workdir

GALLERY_FIELDS = (*OWN_FIELDS, "unknown")  # fields of a manifest that concern the gallery alone


class TrainedEmbedder:
    """Maps images to unit vectors with the networks of a finished run.

    Attributes:
      workdir: of the run.
      config: of the run.
      record: fields of the manifest that concern the networks: `configuration`, `checkpoint`,
        `step`, `preprocessing`, fusion `weights`, ...
      variables: of the networks.
    """

    def __init__(
        self, workdir: Workdir, config: ExperimentConfig, record: dict[str, Any], variables: PyTree
    ) -> None:
        self.workdir, self.config, self.record, self.variables = workdir, config, record, variables
        networks = build_networks(config, record["training_classes"])
        batch_of_one = dataclasses.replace(config.evaluation, batch_size=1)
        single = Embedding(networks, dataclasses.replace(config, evaluation=batch_of_one))
        self._one = single.fused(record["weights"])
        self._many = Embedding(networks, config).fused(record["weights"])

    @classmethod
    def load(cls, directory: Path) -> "TrainedEmbedder":
        """Loads the networks of a finished run.

        Raises:
          UserError: no run, a run that is not finished, or embeddings of another checkpoint or
            preprocessing.
        """
        workdir = Workdir(directory)
        if workdir.stored() is None:
            raise UserError(f"--run={directory}: holds no run (config.json is missing)")
        if not workdir.result.is_file():
            raise UserError(f"--run={directory}: the run is not finished; start it again to resume")
        manifest = read_manifest(workdir.embeddings)
        record = {name: v for name, v in manifest.items() if name not in GALLERY_FIELDS}
        config = configuration.from_dict(record["configuration"])
        train_state = restore(workdir, config, record["training_classes"], record["step"])
        expected = {
            "checkpoint": checkpoint_id(train_state),
            "preprocessing": preprocessing(config.data) | preprocessing_record(config),
        }
        for name, value in expected.items():
            if record[name] != value:
                raise UserError(
                    f"{workdir.embeddings} does not match the run: {name} {record[name]!r}, not "
                    f"{value!r}; start the run again"
                )
        return cls(workdir, config, record, train_state.search_variables())

    def __call__(self, images: ImageSet) -> Float32[np.ndarray, "n d"]:
        """Embeds an image set; one unit vector per image."""
        return self._many(self.variables, images)

    def one(self, image: RawImage) -> Float32[np.ndarray, "1 d"]:
        """Embeds one image, compiled for a batch of one."""
        images = ImageSet([image], np.zeros(1, np.int64), ("query",), np.zeros(1, bool))
        return self._one(self.variables, images)


def restore(workdir: Workdir, config: ExperimentConfig, classes: int, step: int) -> TrainState:
    """Restores the train state of a run at a step.

    Args:
      workdir: of the run.
      config: of the run.
      classes: number of training classes.
      step: step of the checkpoint.

    Raises:
      UserError: the run has no such checkpoint, or its configuration differs.
    """
    networks = build_networks(config, classes)
    optimisers = optim.optimisers(config, 1, 1, 1)  # only the shape of their state is needed
    shapes = jax.eval_shape(
        lambda: state.create(networks, optimisers, config.seed, config.data.image_size, config.loss)
    )
    with Checkpoints(workdir.checkpoints, config.train.keep_best) as checkpoints:
        if step not in checkpoints.steps():
            raise UserError(f"{workdir.checkpoints} has no checkpoint of step {step}")
        return checkpoints.restore(shapes, config, step)[0]
