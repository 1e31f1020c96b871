"""Tables of README and docs are those of the result files, and figures in their text too."""

import json
import re
import shutil

import pytest
from paths import ROOT

from afa.errors import UserError
from afa.runs import result_files
from experiments import results as command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = sorted((ROOT / "docs" / "results").glob("*.json"))
MEASURED = [page for page in PAGES if "<!-- table:" in page.read_text("utf-8")]
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
SOURCE = re.compile(r"<!-- (?:table|figures): (\S+) -->")
FIGURE = re.compile(r"(?<![\w.])[+−]?\d[\d,]*\.\d+(?![\d.]*\.\d)(?![\w-])")
OTHER = re.compile(r"```.*?```|`[^`\n]+`|<!--.*?-->|\]\([^)]*\)|^\|.*$", re.MULTILINE | re.DOTALL)

pages = pytest.mark.parametrize("page", MEASURED, ids=lambda page: page.name)


def sections(page):
    """Yields title and text of the sections of a page."""
    for part in re.split(r"^(?=## )", page.read_text("utf-8"), flags=re.MULTILINE):
        yield part.partition("\n")[0].lstrip("# "), part


@pages
def test_tables_are_those_of_the_result_files(page):
    for path, text, correct in result_files.tables_of(page):
        assert text == correct, f"{path} (experiments.results {page} writes it anew)"


@pages
def test_measured_tables_name_their_file(page):
    for title, text in sections(page):
        for table in TABLE.finditer(text):
            measured = len(FIGURE.findall(table[0])) > 4
            marked = text[: table.start()].rstrip("\n").endswith("-->")
            assert marked or not measured, f"{page.name}, {title}: {table[0][:80]}"


@pages
def test_figures_in_the_text_are_those_of_a_result_file(page):
    for title, text in sections(page):
        known = set()
        for name in SOURCE.findall(text):
            table = result_files.load(page.parent / name)
            cells = [cell for row in table.texts() for cell in row]
            for cell in [*cells, *table.figure_texts().values(), table.hardware]:
                known |= {found.lstrip("+−") for found in FIGURE.findall(cell)}
        if known:
            found = {each.lstrip("+−") for each in FIGURE.findall(OTHER.sub(" ", text))}
            assert not found - known, f"{page.name}, {title}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_result_files_say_how_they_were_measured(path):
    table = result_files.load(path)
    assert re.search(r"^python -m experiments\.|^launch/", table.command)
    assert re.fullmatch(r"[0-9a-f]{40}", table.commit)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", table.date)
    assert table.hardware and table.seeds
    assert "/" not in table.command.replace("launch/", ""), "a path of one machine"
    used = [path for page in MEASURED for path in SOURCE.findall(page.read_text("utf-8"))]
    assert any(name.endswith(f"results/{path.name}") for name in used), "no page shows it"


def test_a_changed_digit_is_found_and_written_anew(tmp_path):
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    page = tmp_path / "results.md"
    right = (ROOT / "docs" / "results.md").read_text("utf-8")
    wrong = right.replace("| fused | 2.0 | 78.4 ±", "| fused | 2.0 | 78.5 ±")
    assert wrong != right
    page.write_text(wrong, "utf-8")
    assert [text == correct for _, text, correct in result_files.tables_of(page)].count(False) == 1
    assert command.main([str(page)]) == 0
    assert page.read_text("utf-8") == right


def test_cells():
    column = result_files.Column("x", scale=100.0, digits=1)
    signed = result_files.Column("x", digits=2, sign=True)
    assert column.text(None) == ""
    assert column.text("word") == "word"
    assert column.text(0.123) == "12.3"
    assert column.text([0.5, {"values": [0.1, 0.2, 0.3]}]) == "50.0 / 20.0 ± 24.8"
    assert column.text({"values": [0.1, 0.3]}) == "20.0"  # two seeds give no interval
    assert column.text({"values": [0.1, 0.1, 0.1]}) == "10.0"
    assert signed.text(-1.5) == "−1.50"
    assert signed.text({"mean": 1.5, "half": 0.25}) == "+1.50 ± 0.25"
    assert signed.text({"mean": 1, "low": -1, "high": 2}) == "+1.00 [−1.00, +2.00]"
    assert result_files.Column("x", digits=0).text(1234567) == "1,234,567"


def test_a_saved_table_is_read_again(tmp_path):
    table = result_files.load(FILES[0])
    result_files.save(tmp_path / "x.json", table)
    assert result_files.load(tmp_path / "x.json") == table
    assert (tmp_path / "x.json").read_text("utf-8") == FILES[0].read_text("utf-8")


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"columns": [], "rows": [[1]]}))
    with pytest.raises(UserError, match=r"x\.json: is not a result file"):
        result_files.load(path)
