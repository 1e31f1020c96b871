"""Registry of data sets: `data.name` -> images in three class-disjoint splits."""

import importlib
from pathlib import Path

import numpy as np

from afa.config import DataConfig
from afa.data.sources.tfds import PREFIX, PROTOCOLS, load_tfds
from afa.data.types import Dataset
from afa.errors import UserError, nearest
from afa.io import write_json

# Module and function of each data set, imported on use.
SETS = {
    "synthetic": ("afa.data.synthetic.dataset", "load_synthetic"),
    "folder": ("afa.data.sources.folder", "load_folder"),
    "gldv2": ("afa.data.sources.gldv2", "load_gldv2"),
    "inshop": ("afa.data.sources.inshop", "load_inshop"),
}


def load(config: DataConfig) -> Dataset:
    """Loads the data set `config.name`: a name in `SETS`, or tfds:NAME.

    Raises:
      UserError: unknown data set (the message suggests the nearest name), or unusable data.
    """
    if config.name in SETS:
        module, function = SETS[config.name]
        return getattr(importlib.import_module(module), function)(config)
    if config.name.startswith(PREFIX) and config.name != PREFIX:
        return load_tfds(config)
    known = [*SETS, *(PREFIX + name for name in PROTOCOLS)]
    raise UserError(
        f"data.name={config.name!r} is unknown{nearest(config.name, known)} "
        f"(allowed: {', '.join(SETS)}, {PREFIX}NAME)"
    )


def save_split(dataset: Dataset, path: Path) -> None:
    """Writes the splits as JSON: protocol, fingerprint, and for each split its classes, image ids,
    catalogue images and gallery images."""
    splits = {}
    for split, images in dataset.splits.items():
        splits[split] = {
            "classes": [dataset.class_names[c] for c in images.classes],
            "ids": list(images.ids),
        }
        for part, marks in (("catalogue", images.catalogue), ("gallery", images.gallery)):
            if marks is not None and marks.any():
                splits[split][part] = [images.ids[i] for i in np.flatnonzero(marks)]
    content = {
        "data": dataset.name,
        "protocol": dataset.protocol,
        "fingerprint": dataset.fingerprint,
        "skipped": list(dataset.skipped),
        "splits": splits,
    }
    write_json(path, content)
