"""`report.html`: one offline page that shows what a run learned, where it fails and how it went.

The page holds everything it shows. Its content security policy allows nothing but the images and
the style inside it, so opening it asks no machine for anything; it has no scripts. All metrics
given to it are fractions (0 to 1), shown as percent.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from afa.console import BLANK, duration
from afa.io import write_bytes
from afa.report import charts, images
from afa.report.images import Pixels

FOLDER = Path(__file__).parent
TEMPLATE = "page.html"
THUMBNAIL = 144  # pixels of an image's longer side: shown at 72 to 112 CSS pixels
SAMPLE = 96
JPEG_QUALITY = 80

TILES = (  # group of ResultRow, metric, what it is
    ("clean", "recall_at_1", "Recall@1, clean queries"),
    ("clean", "map_at_r", "MAP@R, clean queries"),
    ("trained", "recall_at_1", "Recall@1, trained corruptions"),
    ("held_back", "recall_at_1", "Recall@1, held-back corruptions"),
)
TABLE_GROUPS = (
    ("clean", "Clean queries"),
    ("trained", "Trained corruptions"),
    ("held_back", "Held-back corruptions"),
)


@dataclasses.dataclass(frozen=True)
class Hit:
    """One image found: `correct` None and `class_name` "" when its class is not known."""

    image: Pixels
    id: str
    score: float
    correct: bool | None = None
    class_name: str = ""


@dataclasses.dataclass(frozen=True)
class QueryRow:
    """A query and its results, best first; `corruption` is "" for a clean query."""

    image: Pixels
    id: str
    class_name: str
    results: Sequence[Hit]
    corruption: str = ""


@dataclasses.dataclass(frozen=True)
class Restoration:
    """What G made of a corrupted image; the PSNRs (dB) are against the clean target."""

    corruption: str
    degraded: Pixels
    restored: Pixels
    clean: Pixels
    psnr_in: float
    psnr_out: float


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """A method's metrics by name; `cost` is that of one search relative to the plain backbone.

    `clean`: recall_at_K, map_at_r, r_precision, mean_average_precision of clean queries;
    `trained`, `held_back`: the same names, means over the corruptions and their severities;
    `extra`: figures of pairs and clusters and the CMC curve (`afa.evaluation.metrics.extra`).
    """

    name: str
    cost: int | float | None
    clean: Mapping[str, float]
    trained: Mapping[str, float] = dataclasses.field(default_factory=dict)
    held_back: Mapping[str, float] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SearchFacts:
    """The approximate index against exact search over the same embeddings.

    Attributes:
      recall: of the first `results`.
      queries_per_second: all queries in one call; `single`: one after the other.
      target: recall that the index was tuned for; 0 if it was not.
      curve: (recall, queries a second) of what tuning measured and nothing else beat in both.
    """

    engine: str
    results: int
    recall: float
    queries_per_second: float
    single: float
    gallery_size: int
    dimension: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    target: float = 0.0
    curve: Sequence[tuple[float, float]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """All that `report.html` shows; a part left empty is named as empty on the page.

    Attributes:
      protocol: one sentence: how classes were split and what is searched among what.
      parameters: network (F, G, D, ...) -> number of parameters.
      facts: more labels -> text for the list of facts.
      highlight: name of the row this page is about; `reference`: the row it is measured against.
      robustness: row -> corruption -> severity -> Recall@1.
      held_back: corruptions that training never saw.
      restored: corruption -> mean PSNR in dB, "psnr_in" of the images and "psnr_out" after G.
      history: the lines of metrics.jsonl (`writers.read_history`).
      notes: plain warnings, shown at the top.
    """

    title: str
    experiment: str
    dataset: str
    protocol: str
    hardware: str
    date: str
    commit: str
    seeds: Sequence[int]
    train_seconds: int | float
    parameters: Mapping[str, int]
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    highlight: str = ""
    reference: str = ""
    rows: Sequence[ResultRow] = ()
    queries: Sequence[QueryRow] = ()
    failures: Sequence[QueryRow] = ()
    restorations: Sequence[Restoration] = ()
    restored: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    samples: Sequence[Pixels] = ()
    history: Sequence[Mapping[str, Any]] = ()
    robustness: Mapping[str, Mapping[str, Mapping[int, float]]] = dataclasses.field(
        default_factory=dict
    )
    held_back: Sequence[str] = ()
    search: SearchFacts | None = None
    notes: Sequence[str] = ()


def write_report(path: Path | str, page: Page) -> None:
    """Writes the page as one HTML file, whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        thumb=thumbnail,
        sample=lambda image: thumbnail(image, SAMPLE),
        pretty=charts.pretty,
        duration=duration,
    )
    clean = {r.name: r.clean["recall_at_1"] for r in page.rows if "recall_at_1" in r.clean}
    drawn, legend = charts.robustness_charts(page.robustness, clean, page.held_back, page.highlight)
    text = environment.get_template(TEMPLATE).render(
        page=page,
        tiles=_tiles(page),
        table=_table(page),
        extra=_extra(page),
        cmc=charts.cumulative_chart(
            {row.name: row.extra["cmc"] for row in page.rows if "cmc" in row.extra},
            page.highlight,
        ),
        robustness=drawn,
        legend=legend,
        tuning=charts.tuning_chart(page.search.curve, page.search.target) if page.search else [],
        curves=charts.training_charts(page.history),
        stages=charts.stage_starts(page.history),
    )
    write_bytes(path, text.encode())


def thumbnail(image: Pixels, longest: int = THUMBNAIL) -> Markup:
    """The image, small, as the text of an `<img src>`."""
    small = images.shrunk(image, longest)
    return Markup(images.to_jpeg_data_uri(small, JPEG_QUALITY))


@dataclasses.dataclass(frozen=True)
class Tile:
    """One large figure at the top and what it is compared with."""

    label: str
    value: str
    comparison: str


def _tiles(page: Page) -> list[Tile]:
    rows = {row.name: row for row in page.rows}
    if page.highlight not in rows:
        return []
    ours, other = rows[page.highlight], rows.get(page.reference)
    tiles = []
    for group, metric, label in TILES:
        value = getattr(ours, group).get(metric)
        if value is None or not math.isfinite(value):
            continue
        base = getattr(other, group).get(metric) if other else None
        comparison = ""
        if base is not None and math.isfinite(base):
            comparison = f"{_signed(100 * (value - base))} points against {page.reference}"
        tiles.append(Tile(label, f"{100 * value:.1f}", comparison))
    return tiles


def _signed(value: float) -> str:
    text = f"{abs(value):.1f}"
    return "±0.0" if text == "0.0" else ("+" if value > 0 else "\N{MINUS SIGN}") + text


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of the table and whether it is its column's best."""

    text: str
    best: bool


@dataclasses.dataclass(frozen=True)
class ResultTable:
    """`groups`: (title, labels of its columns); `lines`: (name, highlighted, cost, cells)."""

    groups: tuple[tuple[str, tuple[str, ...]], ...]
    lines: tuple[tuple[str, bool, str, tuple[tuple[Cell, ...], ...]], ...]


def _table(page: Page) -> ResultTable:
    groups, by_group = [], []
    for attribute, title in TABLE_GROUPS:
        scores = [getattr(row, attribute) for row in page.rows]
        metrics = list(dict.fromkeys(name for row in scores for name in row))
        if metrics:
            groups.append((title, tuple(charts.pretty(name) for name in metrics)))
            columns = [_column([row.get(name) for row in scores]) for name in metrics]
            by_group.append(list(zip(*columns, strict=True)))
    lines = tuple(
        (
            row.name,
            row.name == page.highlight,
            BLANK if row.cost is None else f"{row.cost:.2f}",
            tuple(group[i] for group in by_group),
        )
        for i, row in enumerate(page.rows)
    )
    return ResultTable(tuple(groups), lines)


def _extra(page: Page) -> ResultTable:
    """Verification and clusters of the rows that have them, in the form of the table of results."""
    rows = [row for row in page.rows if "pairs" in row.extra]
    rates = list(dict.fromkeys(r for row in rows for r in row.extra["pairs"]["fnmr_at_fmr"]))
    errors = [[row.extra["pairs"]["fnmr_at_fmr"].get(r) for row in rows] for r in rates]
    groups = {
        "Pairs": {"AUROC": _column([row.extra["pairs"]["auroc"] for row in rows])},
        "FNMR at FMR": {
            f"{100 * float(rate):g} %": _column(values, best=min)
            for rate, values in zip(rates, errors, strict=True)
        },
        "Clusters": {
            name.upper(): _column([row.extra["clusters"][name] for row in rows])
            for name in ("nmi", "ami")
        },
    }
    groups = {title: group for title, group in groups.items() if group}
    lines = tuple(
        (
            row.name,
            row.name == page.highlight,
            "",
            tuple(tuple(column[i] for column in group.values()) for group in groups.values()),
        )
        for i, row in enumerate(rows)
    )
    return ResultTable(tuple((title, tuple(group)) for title, group in groups.items()), lines)


def _column(
    values: Sequence[float | None], best: Callable[[Sequence[float]], float] = max
) -> list[Cell]:
    known = [v for v in values if v is not None and math.isfinite(v)]
    # Compared as printed: two rows that show the same figure are both the best.
    top = f"{100 * best(known):.1f}" if len(known) > 1 else None
    cells = []
    for value in values:
        text = BLANK if value is None or not math.isfinite(value) else f"{100 * value:.1f}"
        cells.append(Cell(text.replace("-", "\N{MINUS SIGN}"), text == top))
    return cells
