"""Small line charts as inline SVG: training curves, robustness, CMC and index tuning.

Colours are CSS variables of the page (with fallbacks), so that charts follow its light, dark and
print styles. Charts have no ids, so that equal data give equal bytes. Lines of one chart differ in
colour, dash and marker.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from markupsafe import Markup, escape

WIDTH, HEIGHT = 280, 176  # SVG user units; about the size in CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 36, 14, 8, 24
POINTS = 100  # longer curves are averaged in this many bins
MIN_SHARE = 0.02  # smallest range of the y axis, relative to the values
PADDING = 0.06  # empty share of the y axis above and below a curve
CLEAN = 0  # severity of a clean image
# Fallback colours for a light background; the page defines --s0 ... --s7 for light and dark.
COLOURS = (
    "#2456c7", "#bf5309", "#0b7a6f", "#a32f80", "#666d78", "#6f6a08", "#a3372b", "#6d42bd",
)  # fmt: skip
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MARKERS = ("circle", "square", "triangle", "diamond")

Number: TypeAlias = int | float
Point: TypeAlias = tuple[Number, Number]

GROUPS: tuple[tuple[str, str], ...] = (
    ("Retrieval on validation classes", r"recall|map_at_r|r_precision|average_precision"),
    ("Losses", r"loss"),
    ("Generator and discriminator", r"(^|[/_])(d|g|x|z|r1|psnr|real|fake|discriminator|generator)"),
    ("Other figures", r""),
)
LABELS = (
    (r"recall_at_(\d+)", r"R@\1"),
    (r"map_at_r", "MAP@R"),
    (r"r_precision", "R-Prec."),
    (r"mean_average_precision", "mAP"),
    (r"(?<![a-z])psnr(?![a-z])", "PSNR"),
    (r"(?<![a-z])r1(?![a-z0-9])", "R1"),
    (r"(?<![a-z])d_(?=real|fake)", "D on "),
)
FRACTION = re.compile(r"recall|map_at_r|r_precision|average_precision")
TWINS = re.compile(r"(?<![a-z])(real|fake|in|out)(?![a-z])")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      name: name in tooltips.
      points: (x, y) pairs.
      style: index of colour, dash and marker.
      strong: whether it is drawn thicker and on top.
    """

    name: str
    points: Sequence[Point]
    style: int = 0
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """One small chart with its title, legend and tag."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, Markup], ...] = ()
    tag: str = ""


def line_chart(
    lines: Sequence[Line],
    description: str,
    percent: bool = False,
    markers: bool = False,
    x_range: Point | None = None,
    y_range: Point | None = None,
    x_ticks: Sequence[tuple[Number, str]] | None = None,
    marks: Sequence[tuple[Number, str]] = (),
) -> Markup:
    """Draws lines over one pair of axes.

    Args:
      lines: drawn in order, strong ones last; a point that is not finite interrupts its line.
      description: text for screen readers.
      percent: whether y values are fractions that are shown in percent.
      markers: whether to draw every point, with its value as a tooltip.
      x_range: lowest and highest x; None fits the points.
      y_range: lowest and highest y, in the points' unit; None fits the points.
      x_ticks: (x, label) pairs; None chooses round numbers.
      marks: (x, name) of vertical dashed lines.

    Returns:
      `<svg>` element that scales to the available width.
    """
    scale = 100.0 if percent else 1.0
    lines = [dataclasses.replace(t, points=[(x, y * scale) for x, y in t.points]) for t in lines]
    finite = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    x_low, x_high = x_range or _span([x for x, _ in finite])
    if y_range is None:
        low, high = _padded([y for _, y in finite])
    else:
        low, high = (y * scale for y in y_range)
    ticks, digits = _ticks(low, high, count=4)

    def place_x(x: Number) -> Number:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def place_y(y: Number) -> Number:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(description)}" font-size="11" fill="var(--faint,#5c6168)">'
    ]
    out += _axes(
        [(place_y(tick), _tick_label(tick, digits)) for tick in ticks],
        [
            (place_x(x), text)
            for x, text in x_ticks or [(x, compact(x)) for x in _ticks(x_low, x_high, count=4)[0]]
        ],
    )
    for x, name in marks:
        out.append(
            f'<path d="M{place_x(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="var(--faint,#5c6168)" '
            f'stroke-dasharray="2 4"><title>{escape(name)}</title></path>'
        )
    for line in sorted(lines, key=lambda line: line.strong):
        out += _drawn(line, place_x, place_y, markers, "%" if percent else "")
    return Markup("".join([*out, "</svg>"]))


def _axes(
    rows: Sequence[tuple[Number, str]], columns: Sequence[tuple[Number, str]]
) -> Iterator[str]:
    """Draws horizontal grid lines with labels, and labels of the x axis: (position, text) pairs."""
    for y, text in rows:
        yield (
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="var(--rule,#dcdcd8)"/>'
            f'<text x="{LEFT - 6}" y="{y + 3.8:.1f}" text-anchor="end">{text}</text>'
        )
    for x, text in columns:
        yield (f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{escape(text)}</text>')


def _drawn(
    line: Line,
    place_x: Callable[[Number], Number],
    place_y: Callable[[Number], Number],
    markers: bool,
    unit: str,
) -> list[str]:
    path, pen_down = [], False
    dots = []
    for i, (x, y) in enumerate(line.points):
        if not math.isfinite(y):
            pen_down = False
            continue
        at_x, at_y = place_x(x), place_y(y)
        path.append(f"{'L' if pen_down else 'M'}{at_x:.1f} {at_y:.1f}")
        after = line.points[i + 1][1] if i + 1 < len(line.points) else math.nan
        alone = not pen_down and not math.isfinite(after)
        pen_down = True
        if markers or alone:
            tooltip = escape(f"{line.name}: {y:.1f} {unit}" if unit else f"{line.name}: {y:.4g}")
            shape = _marker(line.style, at_x, at_y, 3.6 if line.strong else 2.9)
            dots.append(f'<path d="{shape}"><title>{tooltip}</title></path>')
    colour = _colour(line.style)
    stroke = f'stroke="{colour}" stroke-width="{2.4 if line.strong else 1.5}"'
    dash = _dash(line.style)
    return [
        f'<path d="{"".join(path)}" fill="none" stroke-linejoin="round" {stroke}{dash}/>',
        *([f'<g fill="{colour}">{"".join(dots)}</g>'] if dots else []),
    ]


def key(style: int, strong: bool = False, markers: bool = False) -> Markup:
    """Draws the sample of a line for a legend."""
    colour = _colour(style)
    dot = f'<path d="{_marker(style, 12, 6, 3.4)}" fill="{colour}"/>' if markers else ""
    return Markup(
        '<svg class="key" viewBox="0 0 24 12" width="24" height="12" aria-hidden="true">'
        f'<path d="M1 6H23" stroke="{colour}" stroke-width="{2.6 if strong else 1.7}"'
        f"{_dash(style)}/>{dot}</svg>"
    )


def training_charts(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Chart]]]:
    """Draws a chart of every metric in metrics.jsonl, in groups.

    Metrics with the same last name (validation/fused/recall_at_1, validation/x/recall_at_1) and
    pairs (d_real, d_fake; psnr_in, psnr_out) share a chart. Retrieval metrics are fractions, drawn
    in percent. The x axis of every chart spans the whole run; dashed lines mark the start of a
    stage.

    Args:
      history: lines of metrics.jsonl (`afa.train.logging.read_history`).

    Returns:
      (title of the group, its charts); groups without charts are left out.
    """
    curves: dict[str, list[Point]] = {}
    for entry in history:
        for name, value in entry.items():
            if name not in ("step", "time", "stage") and isinstance(value, int | float):
                curves.setdefault(name, []).append((entry["step"], float(value)))
    panels: dict[str, list[str]] = {}
    for name in curves:
        panels.setdefault(TWINS.sub("*", name.rsplit("/", 1)[-1]), []).append(name)
    marks = stage_starts(history)[1:]
    end = max([entry["step"] for entry in history], default=0)
    groups: dict[str, list[Chart]] = {title: [] for title, _ in GROUPS}
    for names in panels.values():
        group = next(title for title, pattern in GROUPS if re.search(pattern, names[0]))
        groups[group].append(_training_chart({n: curves[n] for n in names}, marks, end))
    return [(title, charts) for title, charts in groups.items() if charts]


def _training_chart(
    curves: Mapping[str, Sequence[Point]],
    marks: Sequence[tuple[Number, str]],
    end: Number,
) -> Chart:
    title, labels = _titles(list(curves))
    lines = [Line(n, _binned(points), i) for i, (n, points) in enumerate(curves.items())]
    newest = "; ".join(f"{name} ends at {points[-1][1]:.4g}" for name, points in curves.items())
    percent = bool(FRACTION.search(title))
    svg = line_chart(lines, newest, percent, x_range=(0.0, max(end, 1.0)), marks=marks)
    legend = tuple((pretty(label), key(i)) for i, label in enumerate(labels))
    tag = "%" if percent else "dB" if any("psnr" in name for name in curves) else ""
    return Chart(pretty(title), svg, legend if len(lines) > 1 else (), tag)


def _titles(names: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the title of a chart and the labels of its lines: the parts of names that differ."""
    if len(names) == 1:
        return names[0], [""]
    split = [name.split("/") for name in names]
    lasts = list(dict.fromkeys(parts[-1] for parts in split))
    twins = dict.fromkeys(twin for last in lasts for twin in TWINS.findall(last))
    title = TWINS.sub(" / ".join(twins), lasts[0]) if len(lasts) > 1 else lasts[0]
    labels = []
    for parts in split:
        own = [p for i, p in enumerate(parts[:-1]) if any(o[i : i + 1] != [p] for o in split)]
        labels.append("/".join(own + (TWINS.findall(parts[-1]) if len(lasts) > 1 else [])))
    return title, labels


def stage_starts(history: Iterable[Mapping[str, Any]]) -> list[tuple[Number, str]]:
    """Returns (last step logged before it, name) of each stage, in order."""
    starts: list[tuple[Number, str]] = []
    before = 0
    for entry in history:
        if entry.get("stage") and (not starts or starts[-1][1] != entry["stage"]):
            starts.append((before, entry["stage"]))
        before = entry["step"]
    return starts


def robustness_charts(
    robustness: Mapping[str, Mapping[str, Mapping[int, float]]],
    clean: Mapping[str, float],
    held_back: Iterable[str],
    highlight: str,
) -> tuple[list[Chart], tuple[tuple[str, Markup], ...]]:
    """Draws Recall@1 over severity, one chart per corruption with the same y axis.

    Args:
      robustness: method -> corruption -> severity -> Recall@1 (a fraction).
      clean: method -> Recall@1 of clean queries, drawn as severity 0.
      held_back: held-back corruptions; their charts come last.
      highlight: the method that is emphasised.

    Returns:
      The charts and their common legend.
    """
    methods = sorted(robustness, key=lambda name: name != highlight)  # it has the first style
    held = set(held_back)
    corruptions = dict.fromkeys(c for scores in robustness.values() for c in scores)
    scored = [v for s in robustness.values() for c in s.values() for v in c.values()]
    top = max([v for v in [*scored, *clean.values()] if math.isfinite(v)], default=1.0)
    y_range = (0.0, min(math.ceil(top * 10) / 10, 1.0) or 0.1)
    charts = []
    for corruption in sorted(corruptions, key=lambda name: name in held):
        lines = []
        for i, method in enumerate(methods):
            scores = robustness[method].get(corruption, {})
            start = {CLEAN: clean[method]} if method in clean else {}
            points = sorted({**start, **{int(s): v for s, v in scores.items()}}.items())
            lines.append(Line(method, [(float(s), v) for s, v in points], i, method == highlight))
        severities = sorted({x for line in lines for x, _ in line.points})
        ticks = [(s, "clean" if s == CLEAN else f"{s:.0f}") for s in severities]
        description = f"Recall@1 under {pretty(corruption)}: " + "; ".join(
            f"{line.name} " + ", ".join(f"{100 * y:.1f} %" for _, y in line.points)
            for line in lines
        )
        svg = line_chart(lines, description, True, True, y_range=y_range, x_ticks=ticks)
        tag = "held back" if corruption in held else "trained"
        charts.append(Chart(pretty(corruption), svg, tag=tag))
    legend = tuple((m, key(i, m == highlight, markers=True)) for i, m in enumerate(methods))
    return charts, legend


def cumulative_chart(curves: Mapping[str, Sequence[float]], highlight: str) -> list[Chart]:
    """Draws the CMC curves of several methods in one chart; [] without curves.

    Args:
      curves: method -> share of queries with a positive by rank 1, 2, ...
      highlight: the method that is emphasised.
    """
    if not curves:
        return []
    methods = sorted(curves, key=lambda name: name != highlight)  # it has the first style
    lines = [
        Line(name, list(enumerate(curves[name], start=1)), i, name == highlight)
        for i, name in enumerate(methods)
    ]
    last = max(map(len, curves.values()))
    ticks = [(x, str(x)) for x in (1, 5, 10, 20, 50) if x <= last]
    description = "Queries with a right result by rank: " + "; ".join(
        f"{name} {100 * curves[name][0]:.1f} % at 1, {100 * curves[name][-1]:.1f} % at {last}"
        for name in methods
    )
    svg = line_chart(lines, description, percent=True, x_ticks=ticks)
    legend = tuple((name, key(i, name == highlight)) for i, name in enumerate(methods))
    return [Chart("Right by rank (CMC)", svg, legend, "%")]


def tuning_chart(curve: Sequence[Point], target: float) -> list[Chart]:
    """Draws the time of a query over recall; [] without points.

    Args:
      curve: (recall, queries per second), by ascending recall.
      target: target recall of the tuning, marked.
    """
    if not curve:
        return []
    points = [(100 * recall, 1e6 / speed) for recall, speed in curve]
    description = f"Microseconds per query from {points[0][1]:.0f} at a recall of " + (
        f"{points[0][0]:.1f} % to {points[-1][1]:.0f} at {points[-1][0]:.1f} %"
    )
    marks = [(100 * target, f"target {100 * target:g} %")]
    low = min(points[0][0], 100 * target)
    svg = line_chart(
        [Line("settings", points, 0, True)],
        description,
        markers=True,
        x_range=(low - 0.5, 100.5),
        marks=marks,
    )
    return [Chart("Microseconds per query by recall", svg, tag="tuned")]


def pretty(name: str) -> str:
    """Formats the name of a metric or corruption for display.

    `loss/metric_adv` -> `loss · metric adv`, `val/recall_at_1` -> `val · R@1`.
    """
    for pattern, label in LABELS:
        name = re.sub(pattern, label, name)
    return re.sub(r"(?<=\S)/(?=\S)", " · ", name.replace("_", " "))


def compact(value: Number) -> str:
    """Formats a number with a unit prefix: 1500 -> `1.5k`, 2000000 -> `2M`."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _binned(points: Sequence[Point]) -> list[Point]:
    """Averages neighbouring points so that at most POINTS remain."""
    size = -(-len(points) // POINTS)
    runs = (points[i : i + size] for i in range(0, len(points), max(size, 1)))
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]


def _span(values: Sequence[Number]) -> Point:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _padded(values: Sequence[Number]) -> Point:
    """Returns a padded y range; it starts at 0 if the values are close to 0."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    least = MIN_SHARE * (max(abs(low), abs(high)) or 1.0)
    if high - low < least:
        return low - least, high + least
    padding = PADDING * (high - low)
    if 0 <= low < (high - low) * 0.5:
        return 0.0, high + padding
    return low - padding, high + padding


def _ticks(low: Number, high: Number, count: int) -> tuple[list[Number], int]:
    """Returns about `count` round numbers within [low, high], and the decimals they need."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(f for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = next((d for d in range(12) if abs(round(step, d) - step) < step * 1e-6), 12)
    return [i * step for i in range(first, last + 1)], digits


def _tick_label(value: Number, digits: int) -> str:
    if abs(value) >= 1e4:
        return compact(value)
    return f"{value:.{digits}f}" if digits < 5 else f"{value:.3g}"


def _colour(style: int) -> str:
    slot = style % len(COLOURS)
    return f"var(--s{slot},{COLOURS[slot]})"


def _dash(style: int) -> str:
    dash = DASHES[style % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _marker(style: int, x: Number, y: Number, r: Number) -> str:
    """SVG path of the style's marker around (x, y)."""
    shape = MARKERS[style % len(MARKERS)]
    if shape == "circle":
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r:.1f} 0a{r} {r} 0 1 0 {-2 * r:.1f} 0z"
    if shape == "square":
        return f"M{x - r:.1f} {y - r:.1f}h{2 * r:.1f}v{2 * r:.1f}h{-2 * r:.1f}z"
    if shape == "triangle":
        return f"M{x:.1f} {y - r * 1.2:.1f}l{r * 1.2:.1f} {2 * r:.1f}h{-2.4 * r:.1f}z"
    d = r * 1.3
    return f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}z"


ROW, NAMES = 22, 260  # height of a row and width of the names of an interval chart


def interval_chart(rows: Sequence[tuple[str, Number, Number, Number]], title: str) -> str:
    """Draws means and intervals, one row each, as the text of an SVG file.

    Args:
      rows: (name, mean, low, high); fractions, shown in percent.
      title: of the axis.
    """
    low, high = _padded([100 * value for _, *values in rows for value in values])
    ticks, digits = _ticks(low, high, count=5)
    width, height = NAMES + WIDTH, ROW * len(rows) + 44

    def place(value: Number) -> Number:
        return NAMES + (value - low) / (high - low) * (WIDTH - RIGHT)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="11" '
        f'font-family="sans-serif" fill="#333">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for tick in ticks:
        x, bottom = place(tick), ROW * len(rows) + 8
        out.append(f'<path d="M{x:.1f} 8V{bottom}" stroke="#dcdcd8"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">'
                   f"{_tick_label(tick, digits)}</text>")  # fmt: skip
    for i, (name, *values) in enumerate(rows):
        y = 8 + ROW * (i + 0.5)
        mean, left, right = (place(100 * value) for value in values)
        out.append(f'<text x="{NAMES - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        out.append(f'<path d="M{left:.1f} {y}H{right:.1f}" stroke="{COLOURS[0]}" '
                   'stroke-width="2"/>')  # fmt: skip
        out.append(f'<circle cx="{mean:.1f}" cy="{y}" r="4" fill="{COLOURS[0]}">'
                   f"<title>{100 * values[0]:.1f} %</title></circle>")  # fmt: skip
    out.append(f'<text x="{NAMES + WIDTH // 2}" y="{height - 6}" text-anchor="middle">'
               f"{escape(title)}</text></svg>\n")  # fmt: skip
    return "".join(out)
