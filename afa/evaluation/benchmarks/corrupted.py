"""Corrupted queries: clean galleries, and queries under trained, held-back and unseen corruptions.

The benchmark is a list of images, `Row`s. Every image is the square evaluation view of an image of
the test or validation classes, resized and cropped to one size and then, if it is a query,
corrupted with fixed random numbers. Any descriptor of these pixels can be scored: that of a run, or
vectors from a file (`afa.evaluation.benchmarks.files`).

Settings that training could be fitted to are absent: the seed is fixed, and so are the corruptions.

Choices are made on validation classes: with those corruptions that are usual in training, and most
of all with those of them that the descriptor has not been trained on, `left_out`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import Float32, Float64, Int64

from afa.config import TRAINED_CORRUPTIONS, DataConfig
from afa.data.corruptions import CORRUPTIONS, SEVERITIES, held_back
from afa.data.pipeline import Corruption, evaluated
from afa.data.types import Dataset, ImageSet, RawImage, Subset
from afa.data.unseen import UNSEEN, refuse_unseen
from afa.errors import UserError, choose
from afa.evaluation.benchmarks.contract import Figure, mean_figure
from afa.evaluation.evaluator import SHORT
from afa.evaluation.metrics.retrieval import metrics_from_ranks
from afa.evaluation.protocols import drawn_evenly, protocols
from afa.retrieval.exact import Gallery, positive_ranks

NAME = "corrupted_queries"
SEED = 0  # of the drawn queries and of their corruptions, for every descriptor
EVERY = CORRUPTIONS | UNSEEN
GROUPS = {"test": ("trained", "held_back", "unseen"), "validation": ("trained", "left_out")}
USUAL_SEVERITIES = (3, 5)
# One median filter, one standardisation of the input removes these: they are also reported apart.
APART = ("salt_pepper", "contrast")
QUERY, GALLERY, CATALOGUE = "query", "gallery", "catalogue"  # roles
CLEAN: Corruption = ("", 0)

PerQuery = dict[str, Float64[np.ndarray, "q"]]  # metric -> values
Describe = Callable[[Int64[np.ndarray, "n"]], Float32[np.ndarray, "n d"]]
"""Rows of one role -> their unit vectors."""


class Row(NamedTuple):
    """One image of the benchmark.

    Attributes:
      id: unique; the path of its file if it is written.
      label: name of its class.
      role: `QUERY`, `GALLERY` or `CATALOGUE` (the gallery of one clean catalogue image per class).
      corruption: "" for a clean image.
      severity: 1 to 5; 0 for a clean image.
      image: id of the image in the data set; a query does not find the gallery row of its image.
    """

    id: str
    label: str
    role: str
    corruption: str
    severity: int
    image: str


@dataclasses.dataclass(frozen=True)
class Definition:
    """What the figures were measured on; equal definitions have equal pixels.

    Attributes:
      data: name of the data set.
      split: "test" or "validation".
      fingerprint: of the images of the test classes, or of all images for another split.
      image_size: side of the images, in pixels.
      queries: number of queries.
      protocols: role of a gallery -> name of its protocol.
      groups: group -> its corruptions.
      severities: of every corruption.
      seed: `SEED`.
    """

    data: str
    split: str
    fingerprint: str
    image_size: int
    queries: int
    protocols: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]]
    severities: tuple[int, ...]
    seed: int = SEED

    @property
    def conditions(self) -> list[Corruption]:
        """Clean queries, then every corruption and severity."""
        names = [name for group in self.groups.values() for name in group]
        return [CLEAN, *((name, severity) for name in names for severity in self.severities)]


@dataclasses.dataclass(frozen=True)
class CorruptedQueries:
    """The benchmark on one data set.

    Attributes:
      definition: what is measured.
      rows: all images.
      images: their pixels, made on access.
    """

    definition: Definition
    rows: tuple[Row, ...]
    images: Sequence[RawImage]

    def image_set(self, index: Int64[np.ndarray, "n"]) -> ImageSet:
        """The images of some rows, to be embedded."""
        none = np.zeros(len(index), np.int64)
        ids = tuple(self.rows[i].id for i in index)
        return ImageSet(Subset(self.images, index), none, ids, none.astype(bool))


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the result table.

    Attributes:
      protocol: name of the protocol.
      group: group of corruptions; "" for clean queries.
      part: "clean", a group, a group without `APART`, or a corruption.
      severity: None for the mean over all severities; 0 for clean queries.
      figures: metric (`SHORT`) -> its mean and 95 % interval over classes.
    """

    protocol: str
    group: str
    part: str
    severity: int | None
    figures: dict[str, Figure]


# ---- the images --------------------------------------------------------------------------------


class Rendered(Sequence[RawImage]):
    """Evaluation views of images, corrupted or not, made on access.

    Args:
      images: of the classes.
      data: their size.
      which: index and corruption of each view.
    """

    def __init__(
        self, images: ImageSet, data: DataConfig, which: Sequence[tuple[int, Corruption]]
    ) -> None:
        self.images, self.data, self.which = images, data, which

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, index: int) -> RawImage: ...
    @overload
    def __getitem__(self, index: slice) -> "Rendered": ...
    def __getitem__(self, index: int | slice) -> "RawImage | Rendered":
        if isinstance(index, slice):
            return Rendered(self.images, self.data, self.which[index])
        at, corruption = self.which[index]
        applied = None if corruption == CLEAN else corruption
        return evaluated(self.images, at, self.data, applied, SEED, EVERY)


def grouped(
    names: Sequence[str] | None, trained: tuple[str, ...], split: str = "test"
) -> dict[str, tuple[str, ...]]:
    """Returns the corruptions of each chosen group; a group without corruptions is left out.

    Args:
      names: of the `GROUPS` of the split; None for all.
      trained: corruptions that the descriptor was trained on.
      split: "test" or "validation".

    Raises:
      UserError: unknown split, group or corruption, an unseen corruption among the trained ones, or
        only groups without corruptions.
    """
    allowed = choose("--split", split, GROUPS)
    refuse_unseen("data.corruptions", trained)
    for name in trained:
        choose("data.corruptions", name, CORRUPTIONS)
    every = {
        "trained": trained,
        "left_out": tuple(name for name in TRAINED_CORRUPTIONS if name not in trained),
        "held_back": held_back(trained),
        "unseen": tuple(UNSEEN),
    }
    names = allowed if names is None else names
    for name in names:
        choose("--groups", name, every)
        if name not in allowed:
            raise UserError(
                f"--groups={name} does not go with --split={split} (allowed: {', '.join(allowed)})"
            )
    found = {name: every[name] for name in allowed if name in names and every[name]}
    if not found:
        raise UserError(f"--groups={' '.join(names)}: there are no such corruptions")
    return found


def check_severities(severities: Sequence[int]) -> tuple[int, ...]:
    """Returns severities in ascending order, each once.

    Raises:
      UserError: none, or one outside 1 to 5.
    """
    if not severities or not set(severities) <= set(SEVERITIES):
        given = " ".join(map(str, severities))
        raise UserError(f"--severities={given} must lie between 1 and 5")
    return tuple(sorted(set(severities)))


def define(
    dataset: Dataset,
    data: DataConfig,
    groups: Mapping[str, tuple[str, ...]],
    severities: tuple[int, ...],
    queries: int = 0,
    protocol: str = "auto",
    split: str = "test",
) -> CorruptedQueries:
    """Lists the images of the benchmark on the test or validation classes of a data set.

    Args:
      dataset: the data set.
      data: its settings; `image_size` is the side of all images. They are not cropped further.
      groups: from `grouped`.
      severities: from `check_severities`.
      queries: number of queries, drawn evenly over the classes; 0 for all.
      protocol: as `evaluation.protocol`; "auto": the main protocol of the data set, and
        `catalogue` if there are catalogue images.
      split: "test" or "validation".

    Raises:
      UserError: a negative number of queries, or an unknown or unsupported protocol.
    """
    if queries < 0:
        raise UserError(f"--queries={queries} must not be negative")
    images = dataset.splits[split]
    main, *others = protocols(images, protocol, "--protocol")
    galleries = {CATALOGUE if main.name == "catalogue" else GALLERY: main}
    galleries.update((CATALOGUE, each) for each in others if each.name == "catalogue")
    drawn = drawn_evenly(images, main.queries, queries, SEED)
    names = {role: each.name for role, each in galleries.items()}
    definition = Definition(
        dataset.name, split, dataset.test_fingerprint if split == "test" else dataset.fingerprint,
        data.image_size, len(drawn), names, groups, severities,
    )  # fmt: skip
    views = [(role, i, CLEAN) for role, each in galleries.items() for i in each.gallery.tolist()]
    views += [(QUERY, i, each) for each in definition.conditions for i in drawn.tolist()]
    rows = tuple(
        Row(
            f"{_folder(role, condition)}/{i:06d}.png",
            dataset.class_names[images.labels[i]],
            role,
            *condition,
            images.ids[i],
        )
        for role, i, condition in views
    )
    whole = dataclasses.replace(data, crop_fraction=1.0)
    rendered = Rendered(images, whole, [(i, condition) for _, i, condition in views])
    return CorruptedQueries(definition, rows, rendered)


def _folder(role: str, condition: Corruption) -> str:
    if role != QUERY:
        return role
    return "query/clean" if condition == CLEAN else f"query/{condition[0]}/{condition[1]}"


# ---- the figures -------------------------------------------------------------------------------


def score(
    definition: Definition,
    rows: Sequence[Row],
    describe: Describe,
    note: Callable[[str], None],
) -> list[Line]:
    """Searches all queries exactly and computes R@1 and MAP@R of every condition and group.

    Args:
      definition: from `CorruptedQueries`.
      rows: from `CorruptedQueries`.
      describe: called once per gallery, and once per corruption and severity.
      note: receives one line of progress per corruption.

    Raises:
      UserError: rows that do not fit the definition, no query with an image of its class in a
        gallery, or vectors that are not finite, not of unit length or of different dimensions.
    """
    parts = _parts(rows)
    labels = np.unique([row.label for row in rows], return_inverse=True)[1]
    searched = _check_parts(definition, rows, parts)
    galleries = {role: Gallery(describe(parts[role, *CLEAN])) for role in searched}
    found: dict[tuple[str, Corruption], PerQuery] = {}
    for condition in definition.conditions:
        at = parts[QUERY, *condition]
        queries = describe(at)
        for role, gallery in galleries.items():
            inside = parts[role, *CLEAN]
            exclude = _positions([rows[i].image for i in at], [rows[i].image for i in inside])
            ranks = positive_ranks(queries, gallery, labels[at], labels[inside], exclude)
            per_query = metrics_from_ranks(np.asarray(ranks), (1,)).per_query
            found[definition.protocols[role], condition] = {n: per_query[n] for n in SHORT}
        if condition[1] == definition.severities[-1]:
            note(f"evaluated {condition[0]} on {len(at)} queries")
    classes = labels[parts[QUERY, *CLEAN]]
    return [
        Line(protocol, group, part, severity, _figures(part, values, classes))
        for protocol in definition.protocols.values()
        for group, part, severity, values in _summaries(
            definition, {c: values for (name, c), values in found.items() if name == protocol}
        )
    ]


def _parts(rows: Sequence[Row]) -> dict[tuple[str, str, int], Int64[np.ndarray, "_"]]:
    """Role, corruption and severity -> positions of the rows."""
    found: dict[tuple[str, str, int], list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault((row.role, row.corruption, row.severity), []).append(i)
    return {key: np.array(index, np.int64) for key, index in found.items()}


def _check_parts(
    definition: Definition,
    rows: Sequence[Row],
    parts: Mapping[tuple[str, str, int], Int64[np.ndarray, "_"]],
) -> list[str]:
    """Returns the roles of the galleries.

    Raises:
      UserError: a gallery or a condition has no rows, or conditions differ in their queries.
    """
    roles = list(definition.protocols)
    needed = [(role, *CLEAN) for role in roles]
    needed += [(QUERY, *condition) for condition in definition.conditions]
    for key in needed:
        if key not in parts:
            named = " ".join(str(each) for each in key if each)
            raise UserError(f"{NAME}: the list of images has no {named} rows")
    clean = [rows[i].image for i in parts[QUERY, *CLEAN]]
    for condition in definition.conditions:
        if [rows[i].image for i in parts[QUERY, *condition]] != clean:
            raise UserError(
                f"{NAME}: the queries of {condition[0]} {condition[1]} are not the clean ones, in "
                "their order"
            )
    return roles


def _positions(queries: Sequence[str], gallery: Sequence[str]) -> Int64[np.ndarray, "q"]:
    """Gallery row that shows the image of each query, -1 for none."""
    at = {image: i for i, image in enumerate(gallery)}
    return np.array([at.get(image, -1) for image in queries], np.int64)


def _summaries(
    definition: Definition, found: Mapping[Corruption, PerQuery]
) -> Iterator[tuple[str, str, int | None, PerQuery]]:
    """Yields group, part, severity and values per query: clean, means of groups and of the
    corruptions that are reported apart, then every corruption."""
    severities = definition.severities
    yield "", "clean", 0, found[CLEAN]
    for group, names in definition.groups.items():
        yield group, group, None, _mean(found, names, severities)
        apart = [name for name in names if name in APART]
        if apart and len(apart) < len(names):
            rest = [name for name in names if name not in apart]
            yield group, f"{group} without {', '.join(apart)}", None, _mean(found, rest, severities)
    for group, names in definition.groups.items():
        for name in names:
            yield group, name, None, _mean(found, [name], severities)
            for severity in severities:
                yield group, name, severity, found[name, severity]


def _mean(
    found: Mapping[Corruption, PerQuery], names: Sequence[str], severities: Sequence[int]
) -> PerQuery:
    """Mean of every query over corruptions and severities."""
    each = [found[name, severity] for name in names for severity in severities]
    return {metric: np.mean([values[metric] for values in each], axis=0) for metric in SHORT}


def _figures(part: str, values: PerQuery, classes: Int64[np.ndarray, "q"]) -> dict[str, Figure]:
    return {metric: mean_figure(part, metric, values[metric], classes) for metric in SHORT}
