"""Result files: the figures of a table, how they were measured, and the table as text.

A result file is small JSON, kept beside the text that shows its table (`docs/results/`):

    {"command", "commit", "date", "hardware", "seeds",
     "columns": [{"name", "scale", "digits", "sign"}], "rows": [[cell, ...]],
     "figures": {name: {"value": cell, ...as a column}}}

A cell is null, a text, a number, one of

    {"values": [...]}            one value per seed: mean and 95 % interval
    {"mean", "half"}             mean and half-width of an interval
    {"mean", "low", "high"}      mean and interval

or a list of cells, which are joined by " / ". A column multiplies its numbers by `scale` and rounds
them to `digits`; `sign` writes a plus sign. `figures` are those in the text around the table.
"""

import html
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from afa.errors import UserError
from afa.evaluation.statistics import mean_and_interval
from afa.io import plain, write_bytes

Cell = Any  # see above
NO_SPREAD = 1e-4  # of the mean: smaller differences between seeds are rounding
Texts = Sequence[Sequence[str]]  # rows of a table; the first row has the names of the columns
LEAST_SEEDS = 3  # fewer give no interval
JOINT = " / "


@dataclass(frozen=True)
class Column:
    """How the numbers of a column are written."""

    name: str
    scale: float = 1.0
    digits: int = 1
    sign: bool = False

    def text(self, cell: Cell) -> str:
        """Returns a cell as text; "" for null."""
        if cell is None:
            return ""
        if isinstance(cell, str):
            return cell
        if isinstance(cell, list | tuple):
            return JOINT.join(map(self.text, cell))
        if not isinstance(cell, Mapping):
            return self._number(cell, self.sign)
        if "low" in cell:
            low, high = (self._number(cell[name], self.sign) for name in ("low", "high"))
            return f"{self._number(cell['mean'], self.sign)} [{low}, {high}]"
        mean, half = _summary(cell)
        shown = self._number(mean, self.sign)
        return shown if half is None else f"{shown} ± {self._number(half)}"

    def _number(self, value: float | int, sign: bool = False) -> str:
        return f"{self.scale * value:{'+' if sign else ''},.{self.digits}f}".replace("-", "−")


def _summary(cell: Mapping[str, Any]) -> tuple[float, float | None]:
    if "values" not in cell:
        return cell["mean"], cell.get("half")
    values = cell["values"]
    if len(values) < LEAST_SEEDS or np.ptp(values) <= NO_SPREAD * np.max(np.abs(values)):
        return float(np.mean(values)), None
    return mean_and_interval(values)


@dataclass(frozen=True)
class Table:
    """The content of a result file."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    command: str = ""
    commit: str = ""
    date: str = ""
    hardware: str = ""
    seeds: Sequence[int] = ()
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def texts(self) -> Texts:
        """Returns the table as text; columns without any value are left out."""
        body = [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)]
                for row in self.rows]  # fmt: skip
        kept = [i for i in range(len(self.columns)) if any(row[i] for row in body)]
        head = [column.name for column in self.columns]
        return [[row[i] for i in kept] for row in [head, *body]]

    def figure_texts(self) -> dict[str, str]:
        """Returns name -> text of the figures."""
        found = {}
        for name, figure in self.figures.items():
            settings = {key: value for key, value in figure.items() if key != "value"}
            found[name] = Column(name, **settings).text(figure["value"])
        return found


def load(path: Path) -> Table:
    """Reads a result file.

    Raises:
      UserError: it is not one.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        content["columns"] = [Column(**column) for column in content["columns"]]
        table = Table(**content)
        table.texts()
        table.figure_texts()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a result file ({error})") from None
    return table


def save(path: Path, table: Table) -> None:
    """Writes a result file, one line per row; numbers with six significant digits."""
    content = plain(table)
    head = {name: content[name] for name in ("command", "commit", "date", "hardware", "seeds")}
    lines = [f"  {json.dumps(name)}: {_line(value)}" for name, value in head.items()]
    for name in ("columns", "rows"):
        rows = ",\n".join(f"    {_line(row)}" for row in content[name])
        lines.append(f'  "{name}": [\n{rows}\n  ]')
    lines.append(f'  "figures": {_line(content["figures"])}')
    write_bytes(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _line(value: Any) -> str:
    def rounded(part: Any) -> Any:
        if isinstance(part, float):
            return float(f"{part:.6g}")
        if isinstance(part, Mapping):
            return {name: rounded(each) for name, each in part.items()}
        return [rounded(each) for each in part] if isinstance(part, list) else part

    return json.dumps(rounded(value), ensure_ascii=False)


# ---- in text -----------------------------------------------------------------------------------

# A table in a page, below a comment that names its file: <!-- table: results/NAME.json -->
MARKER = re.compile(r"(<!-- table: (\S+) -->\n)((?:\|.*\n)*)")


def tables_of(page: Path) -> Iterator[tuple[Path, str, str]]:
    """Yields the result file, the text and the correct text of every marked table of a page."""
    for _, name, text in MARKER.findall(page.read_text("utf-8")):
        path = page.parent / name
        yield path, text, markdown(load(path).texts()) + "\n"


def updated(page: Path) -> str:
    """Returns a page with its marked tables written anew from their result files."""

    def correct(found: re.Match[str]) -> str:
        return found[1] + markdown(load(page.parent / found[2]).texts()) + "\n"

    return MARKER.sub(correct, page.read_text("utf-8"))


# ---- formats -----------------------------------------------------------------------------------


def markdown(table: Texts) -> str:
    """Formats a table for Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    lines = [re.sub(r"(?<=\|) +(?=\|)", " ", line) for line in lines]  # empty cells
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def comma_separated(table: Texts) -> str:
    """Formats a table as CSV."""
    import csv

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue().rstrip("\n")


def latex(table: Texts) -> str:
    """Formats a table for LaTeX, with the package booktabs."""
    special = {each: f"\\{each}" for each in "&%$#_{}"} | {
        "±": "$\\pm$", "−": "$-$", "×": "$\\times$", "~": "\\textasciitilde{}",
        "\\": "\\textbackslash{}", "^": "\\textasciicircum{}",
    }  # fmt: skip
    lines = [" & ".join("".join(special.get(c, c) for c in cell) for cell in row) + r" \\"
             for row in table]  # fmt: skip
    layout = "l" + "r" * (len(table[0]) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
         r"\bottomrule", r"\end{tabular}"]
    )  # fmt: skip


def hypertext(table: Texts) -> str:
    """Formats a table for HTML."""

    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = [line(row, "td") for row in table[1:]]
    return "\n".join(["<table>", line(table[0], "th"), *body, "</table>"])


FORMATS: dict[str, Callable[[Texts], str]] = {
    "markdown": markdown, "csv": comma_separated, "latex": latex, "html": hypertext,
}  # fmt: skip
