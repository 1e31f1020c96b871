"""Loads the networks of a finished run to embed images as the run embedded its gallery."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, PyTree, UInt8

from afa import config as configuration
from afa import runtime
from afa.config import ExperimentConfig
from afa.data.pipeline import preprocessing
from afa.data.types import Files, ImageSet, RawImage
from afa.errors import UserError
from afa.inference.embed import Embedding
from afa.manifest import MANIFEST, OWN_FIELDS, read_manifest
from afa.models.fusion import Fusion, Role
from afa.models.networks import build_networks, preprocessing_record
from afa.train import optim, state
from afa.train.checkpoint import Checkpoints
from afa.train.state import TrainState, checkpoint_id
from afa.workdir import Workdir

GALLERY_FIELDS = (*OWN_FIELDS, "unknown")  # fields of a manifest that concern the gallery alone
OneImage = str | Path | UInt8[np.ndarray, "_ _ 3"]


class TrainedEmbedder:
    """Maps images to unit vectors with the networks of a finished run.

    Attributes:
      workdir: of the run.
      config: of the run.
      record: fields of the manifest that concern the networks: `configuration`, `checkpoint`,
        `step`, `preprocessing`, `fusion`, ...
      variables: of the networks.
      fusion: how an image becomes a vector.
    """

    def __init__(
        self, workdir: Workdir, config: ExperimentConfig, record: dict[str, Any], variables: PyTree
    ) -> None:
        self.workdir, self.config, self.record, self.variables = workdir, config, record, variables
        networks = build_networks(config, record["training_classes"])
        parts = networks, config.backbone.name, config.data
        single = Embedding(*parts, dataclasses.replace(config.evaluation, batch_size=1))
        self.fusion = Fusion.from_json(record["fusion"])
        self._one = single.fused(self.fusion)
        self._embedding = Embedding(*parts, config.evaluation)

    @classmethod
    def load(cls, directory: Path | str) -> "TrainedEmbedder":
        """Loads the networks of a finished run.

            vectors = afa.load("runs/first").embed(["a.jpg", "b.jpg"])

        Raises:
          UserError: no run, a run that is not finished, or embeddings of another checkpoint or
            preprocessing.
        """
        runtime.keep_programs()
        directory = Path(directory)
        workdir = Workdir(directory)
        if workdir.stored() is None:
            raise UserError(f"--run={directory}: contains no run (config.json is missing)")
        if not workdir.result.is_file():
            raise UserError(f"--run={directory}: the run is not finished; start it again to resume")
        manifest = read_manifest(workdir.embeddings)
        record = {name: v for name, v in manifest.items() if name not in GALLERY_FIELDS}
        for name in ("training_classes", "step", "fusion"):
            if name not in record:
                raise UserError(f"{workdir.embeddings / MANIFEST} is damaged: it lacks {name}")
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

    def embed(
        self, images: OneImage | Sequence[OneImage] | UInt8[np.ndarray, "n _ _ 3"]
    ) -> Float32[np.ndarray, "n d"]:
        """Embeds images as the run embedded its gallery; returns unit vectors.

        Args:
          images: files, or uint8 RGB arrays of shape (h, w, 3); a list of either, or a single one.
            Prefer files for JPEG: large ones are decoded at a smaller scale, as for the gallery,
            and resizing a fully decoded image gives slightly different pixels.

        Raises:
          UserError: no images, unsupported values, or a file that is missing or not an image.
        """
        single = isinstance(images, str | Path) or getattr(images, "ndim", 0) == 3
        sequence: Any = [images] if single else images
        given = list(sequence)
        if not given:
            raise UserError("images: there is none")
        if all(isinstance(each, str | Path) for each in given):
            if missing := [each for each in given if not Path(each).is_file()]:
                raise UserError(f"{missing[0]}: there is no such file")
            source: Sequence[RawImage] = Files(map(str, given))
        else:
            for i, each in enumerate(given):
                _check_pixels(f"images[{i}]", each)
            source = given
        count = len(source)
        ids = tuple(map(str, range(count)))
        chosen = ImageSet(source, np.zeros(count, np.int64), ids, np.zeros(count, bool))
        return self(chosen) if count > 1 else self._one(self.variables, chosen)

    def __call__(self, images: ImageSet, role: Role = "query") -> Float32[np.ndarray, "n d"]:
        """Embeds an image set as queries or as gallery; one unit vector per image."""
        return self._embedding.fused(self.fusion, role)(self.variables, images)

    def one(self, image: RawImage) -> Float32[np.ndarray, "1 d"]:
        """Embeds one image, compiled for a batch of one."""
        images = ImageSet([image], np.zeros(1, np.int64), ("query",), np.zeros(1, bool))
        return self._one(self.variables, images)


def _check_pixels(name: str, image: Any) -> None:
    """Checks that a value is an RGB image.

    Raises:
      UserError: names the type or shape of the value.
    """
    allowed = "(allowed: files alone, or uint8 arrays of shape (h, w, 3) alone)"
    if not isinstance(image, np.ndarray):
        raise UserError(f"{name} is a {type(image).__name__} {allowed}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"{name} is {image.dtype} of shape {image.shape} {allowed}")


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
        lambda: state.create(
            networks, optimisers, config.seed, config.data.image_size, config.loss,
            config.data.batch_size,
        )
    )  # fmt: skip
    with Checkpoints(workdir.checkpoints, config.train.keep_best) as checkpoints:
        if step not in checkpoints.steps():
            raise UserError(f"{workdir.checkpoints} has no checkpoint of step {step}")
        return checkpoints.restore(shapes, config, step)[0]
