"""Renders `report.html`: results, failures and training curves of a run on one offline page.

The page is self-contained. It has no scripts, and its content security policy allows only embedded
images and styles, so that opening it sends no requests. All metrics are fractions (0 to 1), shown
in percent.
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
THUMBNAIL = 144  # pixels of the longer side; shown at 72 to 112 CSS pixels
SAMPLE = 96
JPEG_QUALITY = 80

TILES = (  # group of ResultRow, metric, label
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
    """One result of a query; `correct` is None and `class_name` "" if its class is not known."""

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
    """A corrupted image, its restoration by G, and their PSNRs (dB) to the clean image."""

    corruption: str
    degraded: Pixels
    restored: Pixels
    clean: Pixels
    psnr_in: float
    psnr_out: float


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """Metrics of one variant.

    Attributes:
      name: of the variant.
      cost: FLOPs of one query relative to the plain backbone; None if unknown.
      clean: recall_at_K, map_at_r, r_precision, mean_average_precision of clean queries.
      trained, held_back: means over the corruptions and their severities.
      extra: extra metrics: pairs, clusters and the CMC curve (`afa.evaluation.metrics.extra`).
    """

    name: str
    cost: int | float | None
    clean: Mapping[str, float]
    trained: Mapping[str, float] = dataclasses.field(default_factory=dict)
    held_back: Mapping[str, float] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SearchFacts:
    """The approximate index compared with exact search over the same embeddings.

    Attributes:
      recall: recall of the first `results` results.
      queries_per_second: all queries in one call.
      single: queries per second, one query per call.
      target: target recall of the tuning; 0 if the index was not tuned.
      curve: Pareto front of the tuning: (recall, queries per second).
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
    """The content of `report.html`. The page says so where a part is empty.

    Attributes:
      protocol: one sentence: split of the classes, queries and gallery.
      parameters: network (F, G, D, ...) -> number of parameters.
      facts: label -> text of more entries in the list of facts.
      highlight: name of the row that is emphasised.
      reference: name of the row that it is compared with.
      robustness: row -> corruption -> severity -> Recall@1.
      held_back: held-back corruptions.
      restored: corruption -> mean PSNR in dB, "psnr_in" of the images and "psnr_out" after G.
      history: lines of metrics.jsonl (`afa.train.logging.read_history`).
      notes: warnings, shown at the top.
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
    """Renders the page and writes it atomically as one HTML file."""
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
    """Returns the shrunk image as a JPEG data URI."""
    small = images.shrunk(image, longest)
    return Markup(images.to_jpeg_data_uri(small, JPEG_QUALITY))


@dataclasses.dataclass(frozen=True)
class Tile:
    """One large number at the top of the page and its comparison."""

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
    """One cell of a table, and whether it is the best of its column."""

    text: str
    best: bool


@dataclasses.dataclass(frozen=True)
class ResultTable:
    """A table: `groups` of (title, column labels), `lines` of (name, highlighted, cost, cells)."""

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
    """The table of verification and clustering metrics, of the rows that have them."""
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
    # Compared as printed, so that rows with equal text are both marked as best.
    top = f"{100 * best(known):.1f}" if len(known) > 1 else None
    cells = []
    for value in values:
        text = BLANK if value is None or not math.isfinite(value) else f"{100 * value:.1f}"
        cells.append(Cell(text.replace("-", "\N{MINUS SIGN}"), text == top))
    return cells
