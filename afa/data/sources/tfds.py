"""Data sets of TensorFlow Datasets, read without TensorFlow where they are in array_record."""

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
from rich.progress import track

from afa.config import DataConfig
from afa.data.splits import TEST, TRAIN, VALIDATION, assemble, halves, held_out_text, hold_out
from afa.data.types import Dataset
from afa.errors import UserError, nearest
from afa.io import expanded

PREFIX = "tfds:"
DOWNLOADS = "downloads"  # folder in a data_dir where TFDS keeps what it downloaded
NETWORK_SECONDS = 8  # that the first file may take to be announced
Builder = Any  # a tfds.core.DatasetBuilder, whose own annotations leave out half of it
PROGRESS_FROM = 20_000  # images; reading the labels of fewer takes a second


@dataclass(frozen=True)
class Protocol:
    """How retrieval uses a data set that was made for classification.

    Attributes:
      rule: "halves": the classes of all `splits` together, in the order of their ids, the first
        half trains, the rest tests; "given": train and test have different classes already.
      splits: those read, where the data set has them.
      label, image: features; where there is none of that name, the one the data set declares as
        target or input, or the only one of its kind.
      name: feature that names an image; None: its number is its name.
    """

    rule: Literal["halves", "given"] = "halves"
    splits: tuple[str, ...] = ("train", "validation", "test")
    label: str = "label"
    image: str = "image"
    name: str | None = None


# The splits of the metric learning literature: Oh Song et al. 2016 (birds, cars, products), Lake et
# al. 2015 (omniglot: background alphabets train, evaluation alphabets test).
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
ANY_OTHER = Protocol()


class Records(Sequence[bytes]):
    """The encoded images of several random-access sources, one after another."""

    def __init__(self, sources: Sequence[Sequence[Any]], image: str) -> None:
        self.sources, self.image = sources, image
        self.ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        which = int(np.searchsorted(self.ends, index, side="right"))
        begin = self.ends[which - 1] if which else 0
        return self.sources[which][int(index - begin)][self.image]


def load_tfds(config: DataConfig) -> Dataset:
    """Reads `config.name` = "tfds:NAME[/CONFIG][:VERSION]" from the data_dir `config.path`.

    A prepared array_record copy is read in place, by random access and without TensorFlow. A copy
    in tfrecord alone is read into memory with TensorFlow, where it is installed. A data set that
    is not there is downloaded and prepared as array_record by its TFDS builder.

    Raises:
      UserError: an unknown data set, a copy that cannot be read, or too few classes or images.
    """
    name = config.name.removeprefix(PREFIX)
    builder = _builder(name, config)
    protocol = PROTOCOLS.get(name.split(":")[0].split("/")[0], ANY_OTHER)
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
    split_of_class, text = _share_out(class_ids, sources, splits, protocol, config)
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
    import tensorflow_datasets as tfds  # takes a second: only who needs it waits
    from tensorflow_datasets.core.constants import DATA_DIR

    root = expanded("data.path", config.path or DATA_DIR)
    if config.path and not root.is_dir():
        raise UserError(f"data.path={config.path!r} is no directory (the data_dir of TFDS)")
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
        if not any((root / DOWNLOADS).glob("*")):  # else it may have what it needs
            _require_network(list(builder.url_infos or ()))
        builder.download_and_prepare()
    except Exception as error:  # whatever a builder, the network or the disk comes up with
        for folder in sorted(_folders(root, base) - before, reverse=True):  # deepest first
            with contextlib.suppress(OSError):  # what holds files stays: a download can go on
                folder.rmdir()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data.name={config.name!r} is not in {root} and could not be prepared ({reason}): "
            "prepare it elsewhere as array_record and name that data_dir as data.path"
        ) from error
    return builder


def _folders(root: Path, base: str) -> set[Path]:
    """Folders that TFDS may make while it prepares a data set."""
    tops = (root, root / DOWNLOADS, root / base)
    below = (path for top in tops[1:] for path in top.rglob("*"))
    return {path for path in (*tops, *below) if path.is_dir()}


def _require_network(urls: Sequence[str]) -> None:
    """Asks once for the first file, where TFDS would ask for minutes.

    Raises:
      OSError: no answer.
    """
    for url in urls[:1]:
        with contextlib.suppress(urllib.error.HTTPError):  # any answer shows that there is one
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()


def _prepared(name: str, root: Path, config: DataConfig) -> Path | None:
    """The newest prepared version of a data set under a data_dir, None where there is none."""
    path, _, version = name.partition(":")
    folder = root / path
    if not folder.is_dir():
        return None
    found = _versions(folder)
    if version:
        found = [place for place in found if place.name == version]
    if found:
        return max(found, key=lambda place: [int(part) for part in place.name.split(".")])
    configs = sorted(f"{path}/{sub.name}" for sub in folder.iterdir() if _versions(sub))
    if configs and not version:
        raise UserError(
            f"data.name={config.name!r} has several configurations in {root}: name one of "
            f"{', '.join(PREFIX + one for one in configs)}"
        )
    return None


def _versions(folder: Path) -> list[Path]:
    return [info.parent for info in folder.glob("[0-9]*.*.*[0-9]/dataset_info.json")]


def _features(builder: Builder, protocol: Protocol) -> tuple[str, str]:
    """Names of the features that hold the image and the class."""
    import tensorflow_datasets as tfds

    info = builder.info
    declared = info.supervised_keys or ()

    def only(kind: type, wanted: str, what: str) -> str:
        having = [key for key, feature in info.features.items() if type(feature) is kind]
        for key in (wanted, *(key for key in declared if isinstance(key, str))):
            if key in having:
                return key
        if len(having) != 1:
            raise UserError(
                f"data.name='{PREFIX}{info.full_name}' has {len(having)} {what} features, and one "
                f"is needed (features: {', '.join(sorted(info.features))})"
            )
        return having[0]

    image = only(tfds.features.Image, protocol.image, "image")
    return image, only(tfds.features.ClassLabel, protocol.label, "class")


def _source(builder: Builder, split: str, image: str, config: DataConfig) -> Sequence[Any]:
    """Examples of a split as dictionaries, images left encoded."""
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
            f"{builder.info.file_format.value}, which TensorFlow alone can read: install afa[tf], "
            "or prepare the data set again with file_format='array_record'"
        )
    read: Any = tfds.as_numpy(builder.as_dataset(split=split, decoders=skip, shuffle_files=False))
    return list(read)


def _tracked(source: Sequence[Any], split: str) -> Iterator[Any]:
    examples = (source[i] for i in range(len(source)))
    yield from track(
        examples,
        f"reading the labels of {split}",
        len(source),
        transient=True,
        console=Console(stderr=True),
        disable=len(source) < PROGRESS_FROM,
    )


def _number_repeated(ids: list[str]) -> None:
    """Makes ids unique: a name that stands for several images gets a number each time."""
    seen: dict[str, int] = {}
    for i, name in enumerate(ids):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            ids[i] = f"{name}#{seen[name]}"


def _share_out(
    labels: Int64[np.ndarray, "n"],
    sources: Sequence[Sequence[Any]],
    splits: Sequence[str],
    protocol: Protocol,
    config: DataConfig,
) -> tuple[dict[int, str], str]:
    """Split of every class, and the sentence that says how it came about."""
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
        how = f"the splits as they are: {len(training)} classes of train train"
    else:
        # An unlabelled image has label -1 in TFDS; it belongs to no class and is left out.
        training, testing = halves(sorted({int(c) for c in labels if c >= 0}))
        how = f"of the classes of {', '.join(splits)}, by id, the first {len(training)} train"
    training, validation = hold_out(training, config)
    text = (
        f"class-disjoint: {how} ({held_out_text(len(validation), config)}), "
        f"the other {len(testing)} test"
    )
    where = {TRAIN: training, VALIDATION: validation, TEST: testing}
    return {c: split for split, classes in where.items() for c in classes}, text
