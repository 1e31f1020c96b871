"""TFDS builder of the synthetic data set. A separate module, because TFDS is slow to import."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class SyntheticObjects(tfds.core.GeneratorBasedBuilder):
    """Rendered objects: one catalogue view and several in-the-wild views of each."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        data_dir: Path,
        examples: Callable[[str], Iterator[dict[str, Any]]],
        classes: int,
    ) -> None:
        """
        Args:
          data_dir: directory that the data set is written to.
          examples: called with the name of a split; yields its examples in order.
          classes: number of objects in all splits.
        """
        self._examples, self._classes = examples, classes
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural objects for instance retrieval: shape and texture both count.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=self._classes),
                    "id": tfds.features.Text(),
                    "catalogue": tfds.features.Scalar(np.bool_),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # keeps the order of the examples, and so of the ids
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self._examples(split))
