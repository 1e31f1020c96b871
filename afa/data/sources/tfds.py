"""Data sets of TensorFlow Datasets; those stored as array_record are read without TensorFlow."""

import contextlib
import importlib.util
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64
from rich.console import Console

from afa.config import DataConfig
from afa.console import track
from afa.data.splits import TEST, TRAIN, VALIDATION, assemble, halves, held_out_text, hold_out
from afa.data.types import Dataset
from afa.errors import UserError, nearest
from afa.io import expanded

PREFIX = "tfds:"
DOWNLOADS = "downloads"  # folder in a data_dir that holds the downloads of TFDS
NETWORK_SECONDS = 8  # timeout of the network check
Builder = Any  # a tfds.core.DatasetBuilder, whose type annotations are incomplete
PROGRESS_FROM = 20_000  # images; fewer labels are read in a second


@dataclass(frozen=True)
class Protocol:
    """Retrieval protocol of a classification data set.

    Attributes:
      rule: "halves": the classes of all `splits` are pooled; the first half, in order of class id,
        is for training, the rest for testing. "given": train and test already share no class.
      splits: TFDS splits to read, if the data set has them.
      label, image: feature names; if missing, the declared target or input, or the only feature of
        that type.
      name: feature that is the name of an image; None to use its index.
    """

    rule: Literal["halves", "given"] = "halves"
    splits: tuple[str, ...] = ("train", "validation", "test")
    label: str = "label"
    image: str = "image"
    name: str | None = None


# Splits of the metric learning literature: Oh Song et al. 2016 (birds, cars, products), Lake et al.
# 2015 (omniglot: background alphabets for training, evaluation alphabets for testing).
PROTOCOLS = {
    "caltech_birds2011": Protocol(name="image/filename"),  # 100 / 100 species
    "cars196": Protocol(),  # 98 / 98 models
    "stanford_online_products": Protocol("given", label="class_id"),  # 11,318 / 11,316 products
    "omniglot": Protocol("given", splits=("train", "test")),  # 964 / 659 characters
    "cifar100": Protocol(name="id"),  # 50 / 50
    "oxford_flowers102": Protocol(name="file_name"),  # 51 / 51
    "imagenet2012": Protocol(splits=("train", "validation"), name="file_name"),  # 500 / 500
    "cmaterdb": Protocol(),  # 5 / 5 digits of each script
}
DEFAULT = Protocol()


class Records(Sequence[bytes]):
    """The encoded images of several random-access sources, concatenated."""

    def __init__(self, sources: Sequence[Sequence[Any]], image: str) -> None:
        self.sources, self.image = sources, image
        self.ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        source = int(np.searchsorted(self.ends, index, side="right"))
        begin = self.ends[source - 1] if source else 0
        return self.sources[source][int(index - begin)][self.image]


def load_tfds(config: DataConfig) -> Dataset:
    """Loads `config.name` = "tfds:NAME[/CONFIG][:VERSION]" from the data_dir `config.path`.

    A prepared array_record copy is read by random access, without TensorFlow. A tfrecord copy is
    read into memory with TensorFlow, if it is installed. A data set that is not in the data_dir is
    downloaded and prepared as array_record by its TFDS builder.

    Raises:
      UserError: unknown data set, a copy that cannot be read, or too few classes or images.
    """
    name = config.name.removeprefix(PREFIX)
    builder = _builder(name, config)
    protocol = PROTOCOLS.get(name.split(":")[0].split("/")[0], DEFAULT)
    splits = [s for s in protocol.splits if s in builder.info.splits] or list(builder.info.splits)
    image, label = _features(builder, protocol)
    sources = [_source(builder, split, image, config) for split in splits]
    ids, labels, sizes = [], [], []
    for split, source in zip(splits, sources, strict=True):
        for number, example in enumerate(_tracked(source, split)):
            own = example.get(protocol.name) if protocol.name else None
            ids.append(f"{split}/{own.decode() if own else f'{number:07d}'}")
            labels.append(int(example[label]))
            sizes.append(len(example[image]))
    _number_repeated(ids)
    class_ids = np.array(labels, np.int64)
    split_of_class, text = _assign_splits(class_ids, sources, splits, protocol, config)
    feature = builder.info.features[label]
    names = [feature.int2str(i) for i in range(feature.num_classes)]
    return assemble(
        config.name,
        Records(sources, image),
        ids,
        class_ids,
        np.zeros(len(ids), bool),
        sizes,
        names,
        split_of_class,
        text,
    )


def _builder(name: str, config: DataConfig) -> Builder:
    import tensorflow_datasets as tfds  # slow import
    from tensorflow_datasets.core.constants import DATA_DIR

    root = expanded("data.path", config.path or DATA_DIR)
    if config.path and not root.is_dir():
        raise UserError(f"data.path={config.path!r} is not a directory (the data_dir of TFDS)")
    prepared = _prepared(name, root, config)
    if prepared is not None:
        return tfds.builder_from_directory(prepared)
    known = tfds.list_builders(with_community_datasets=False)
    base = name.split(":")[0].split("/")[0]
    if base not in known:
        raise UserError(
            f"data.name={config.name!r}: not prepared in {root}, and TFDS knows no {base!r}"
            f"{nearest(base, known)}"
        )
    Console(stderr=True).print(f"{config.name} is not in {root}: downloading and preparing it")
    before = _folders(root, base)
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        if not any((root / DOWNLOADS).glob("*")):  # else the files may already be there
            _require_network(list(builder.url_infos or ()))
        builder.download_and_prepare()
    except Exception as error:  # builders, the network and the disk can raise anything
        for folder in sorted(_folders(root, base) - before, reverse=True):  # deepest first
            with contextlib.suppress(OSError):  # keeps files, to resume a download
                folder.rmdir()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data.name={config.name!r} is not in {root} and could not be prepared ({reason}): "
            "prepare it elsewhere as array_record, and set data.path to that data_dir"
        ) from error
    return builder


def _folders(root: Path, base: str) -> set[Path]:
    """Returns the existing folders that TFDS may create while it prepares a data set."""
    tops = (root, root / DOWNLOADS, root / base)
    below = (path for top in tops[1:] for path in top.rglob("*"))
    return {path for path in (*tops, *below) if path.is_dir()}


def _require_network(urls: Sequence[str]) -> None:
    """Requests the first file once, because TFDS would retry for minutes without a network.

    Raises:
      OSError: no answer.
    """
    for url in urls[:1]:
        with contextlib.suppress(urllib.error.HTTPError):  # any answer shows that the network works
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()


def _prepared(name: str, root: Path, config: DataConfig) -> Path | None:
    """Returns the newest prepared version of a data set in a data_dir, or None."""
    base, _, version = name.partition(":")
    folder = root / base
    if not folder.is_dir():
        return None
    found = _versions(folder)
    if version:
        found = [path for path in found if path.name == version]
    if found:
        return max(found, key=lambda path: [int(part) for part in path.name.split(".")])
    configs = sorted(f"{base}/{sub.name}" for sub in folder.iterdir() if _versions(sub))
    if configs and not version:
        raise UserError(
            f"data.name={config.name!r} has several configurations in {root}: choose one of "
            f"{', '.join(PREFIX + one for one in configs)}"
        )
    return None


def _versions(folder: Path) -> list[Path]:
    return [info.parent for info in folder.glob("[0-9]*.*.*[0-9]/dataset_info.json")]


def _features(builder: Builder, protocol: Protocol) -> tuple[str, str]:
    """Returns the names of the image and the class feature."""
    import tensorflow_datasets as tfds

    info = builder.info
    declared = info.supervised_keys or ()

    def feature_of(kind: type, wanted: str, what: str) -> str:
        candidates = [key for key, feature in info.features.items() if type(feature) is kind]
        for key in (wanted, *(key for key in declared if isinstance(key, str))):
            if key in candidates:
                return key
        if len(candidates) != 1:
            raise UserError(
                f"data.name='{PREFIX}{info.full_name}' has {len(candidates)} {what} features, and "
                f"one is needed (features: {', '.join(sorted(info.features))})"
            )
        return candidates[0]

    image = feature_of(tfds.features.Image, protocol.image, "image")
    return image, feature_of(tfds.features.ClassLabel, protocol.label, "class")


def _source(builder: Builder, split: str, image: str, config: DataConfig) -> Sequence[Any]:
    """Returns the examples of a split as dictionaries, with encoded images."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.file_adapters import FileFormat

    skip = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    if builder.info.available_file_formats() & FileFormat.with_random_access():
        return builder.as_data_source(split, decoders=skip)
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"data.name={config.name!r} in {builder.data_dir} is stored as "
            f"{builder.info.file_format.value}, which only TensorFlow can read: install afa[tf], "
            "or prepare the data set again with file_format='array_record'"
        )
    read: Any = tfds.as_numpy(builder.as_dataset(split=split, decoders=skip, shuffle_files=False))
    return list(read)


def _tracked(source: Sequence[Any], split: str) -> Iterator[Any]:
    examples = (source[i] for i in range(len(source)))
    yield from track(examples, f"reading the labels of {split}", len(source), PROGRESS_FROM)


def _number_repeated(ids: list[str]) -> None:
    """Makes ids unique: appends a number to repeated names."""
    seen: dict[str, int] = {}
    for i, name in enumerate(ids):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            ids[i] = f"{name}#{seen[name]}"


def _assign_splits(
    labels: Int64[np.ndarray, "n"],
    sources: Sequence[Sequence[Any]],
    splits: Sequence[str],
    protocol: Protocol,
    config: DataConfig,
) -> tuple[dict[int, str], str]:
    """Returns the split of every class, and the sentence that describes the protocol."""
    ends = np.cumsum([len(source) for source in sources])[:-1]
    parts = dict(zip(splits, np.split(labels, ends), strict=True))
    if protocol.rule == "given":
        training, testing = (
            sorted({int(c) for c in parts.get(split, ()) if c >= 0}) for split in (TRAIN, TEST)
        )
        shared = set(training) & set(testing)
        if shared or not training or not testing:
            raise UserError(
                f"data.name={config.name!r}: its protocol needs splits train and test without a "
                f"class in common; found {', '.join(splits)} with {len(shared)} classes in common"
            )
        how = f"splits as given: {len(training)} classes of train train"
    else:
        # Unlabelled images have label -1 in TFDS and are dropped.
        training, testing = halves(sorted({int(c) for c in labels if c >= 0}))
        how = f"of the classes of {', '.join(splits)}, by id, the first {len(training)} train"
    training, validation = hold_out(training, config)
    text = (
        f"class-disjoint: {how} ({held_out_text(len(validation), config)}), "
        f"the other {len(testing)} test"
    )
    split_classes = {TRAIN: training, VALIDATION: validation, TEST: testing}
    return {c: split for split, classes in split_classes.items() for c in classes}, text
