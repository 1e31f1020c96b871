"""The table of data sets: `data.name` -> pictures in three class-disjoint splits."""

from collections.abc import Callable
from pathlib import Path

from afa.config import DataConfig
from afa.data.tfds_source import PREFIX, PROTOCOLS, load_tfds
from afa.data.types import Dataset
from afa.errors import UserError, nearest
from afa.report.writers import write_json


def _embedded(config: DataConfig) -> Dataset:
    from afa.data.embedded import load_embedded  # builds the set: only who needs it imports it

    return load_embedded(config)


def _folder(config: DataConfig) -> Dataset:
    from afa.data.folder import load_folder

    return load_folder(config)


SETS: dict[str, Callable[[DataConfig], Dataset]] = {"embedded": _embedded, "folder": _folder}


def load(config: DataConfig) -> Dataset:
    """Loads the data set `config.name`: embedded, folder, or tfds:NAME.

    Raises:
      UserError: no such data set (the nearest name is given), or its data are not usable.
    """
    if config.name in SETS:
        return SETS[config.name](config)
    if config.name.startswith(PREFIX) and config.name != PREFIX:
        return load_tfds(config)
    known = [*SETS, *(PREFIX + name for name in PROTOCOLS)]
    raise UserError(
        f"data.name={config.name!r} is unknown{nearest(config.name, known)} "
        f"(allowed: {', '.join(SETS)}, {PREFIX}NAME)"
    )


def save_split(dataset: Dataset, path: Path) -> None:
    """Writes who is where as JSON: protocol, fingerprint, classes and picture ids of each split."""
    splits = {
        split: {
            "classes": [dataset.class_names[c] for c in images.classes],
            "ids": list(images.ids),
        }
        for split, images in dataset.splits.items()
    }
    content = {
        "data": dataset.name,
        "protocol": dataset.protocol,
        "fingerprint": dataset.fingerprint,
        "skipped": list(dataset.skipped),
        "splits": splits,
    }
    write_json(path, content)
