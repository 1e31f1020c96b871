import base64
import html.parser
import io
import math
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from afa import console
from afa.report import charts, images
from afa.report.page import Hit, Page, QueryRow, Restoration, ResultRow, SearchFacts, write_report

HOSTILE = "<script>alert('x')</script>\"'&"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def standard_output(monkeypatch, stream):
    """Puts `stream` in its place; inside a test, since pytest puts its own there before."""
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def image(value=100, height=20, width=20):
    return np.full((height, width, 3), value, np.uint8)


# ---- progress ---------------------------------------------------------------------------------


def test_plain_lines_for_a_log(monkeypatch):
    log = standard_output(monkeypatch, io.StringIO())
    with console.Progress(100, "features", "restore", interval=1e9) as line:
        line.update(1, "features", {"loss": 2.0, "d_real": 0.51}, 1234.4)
        line.update(2, "features", {"loss": 1.9}, 1234.4)  # within the interval: no line
        line.note("saved")
        line.update(50, "restore", {"loss": math.nan}, 10)
        line.update(100, "restore", {}, 10)
    lines = log.getvalue().splitlines()
    assert lines[0] == (
        "1/2 features  step   1/100  loss 2.0000  1,234 images/s  ETA \N{EN DASH}  d_real 0.5100"
    )
    assert lines[1] == "saved"
    assert lines[2].startswith("2/2 restore   step  50/100  loss nan")
    assert lines[3].endswith("ETA 0s")
    assert len(lines) == 4 and "\x1b" not in log.getvalue()


def test_live_line_on_a_terminal(monkeypatch):
    terminal = standard_output(monkeypatch, Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    with console.Progress(10, "features") as line:
        line.update(5, "features", {"loss": 2.0, "r1": 0.1}, 100)
        line.note("saved [step 5]")
        line.update(10, "features", {"loss": 1.0, "r1": 0.1}, 100)
    assert "saved [step 5]" in terminal.getvalue()
    assert "10/10  loss 1.0000  100 images/s  ETA 0s" in terminal.getvalue()


def test_time_left_is_the_recent_pace(monkeypatch):
    log = standard_output(monkeypatch, io.StringIO())
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    line = console.Progress(400, interval=0)
    for step in (100, 200, 300):
        line.update(step, "s", {}, 1)
    assert [text.split("ETA ")[1] for text in log.getvalue().splitlines()] == [
        console.BLANK,
        "20s",
        "10s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.4, "8s"), (185, "3m 05s"), (7620, "2h 07m"), (4 * 86400 + 3 * 3600, "4d 03h")],
)
def test_duration(seconds, text):
    assert console.duration(seconds) == text


def test_figure_keeps_four_digits():
    shown = [console.figure(x) for x in (0.0, 0.012345, 12.3456, 123456.7, 1e-5, math.inf)]
    assert shown == ["0", "0.0123", "12.35", "123,457", "1.00e-05", "inf"]


def test_table_in_a_log_is_plain_aligned_and_unwrapped(monkeypatch):
    log = standard_output(monkeypatch, io.StringIO())
    rows = [["Raw pixels", None, 0.1, 1200], ["x" * 150, 2.5, 0.808, 7], ["bad", 1, math.nan, 0]]
    console.table("Test classes", rows, ["Method", "Cost", "R@1 %", "Queries"])
    lines = [line for line in log.getvalue().splitlines() if line.strip()]
    assert lines[0].strip() == "Test classes" and len(lines) == 6
    assert lines[3].split() == ["Raw", "pixels", console.BLANK, "10.0", "1,200"]
    assert lines[4].split()[1:] == ["2.500", "80.8", "7"]
    assert lines[5].split()[1:] == ["1", console.BLANK, "0"]
    assert len({len(line) for line in lines[3:]}) == 1
    assert "\x1b" not in log.getvalue()


def test_table_on_a_terminal_marks_the_best(monkeypatch):
    terminal = standard_output(monkeypatch, Terminal())
    console.table("T", [["a", 0.5], ["b", 0.75]], ["Method", "R@1 %"])
    assert re.search(r"\x1b\[1;32m *75\.0", terminal.getvalue())
    assert not re.search(r"\x1b\[1;32m *50\.0", terminal.getvalue())


# ---- images ---------------------------------------------------------------------------------


def test_grid_places_rows_and_gaps():
    sheet = images.grid([image(i) for i in range(3)], columns=2, gap=4)
    assert sheet.shape == (44, 44, 3)
    assert [int(sheet[y, x, 0]) for y, x in ((0, 0), (0, 24), (24, 0))] == [0, 1, 2]
    assert tuple(sheet[0, 22]) == tuple(sheet[30, 30]) == images.PAPER
    for cells, columns in (([], 1), ([image()], 0), ([image(), image(1, 9)], 2)):
        with pytest.raises(ValueError, match="grid"):
            images.grid(cells, columns)


def test_framed_keeps_the_image():
    out = images.framed(image(7), images.RIGHT, 3)
    assert out.shape == (26, 26, 3) and (out[3:-3, 3:-3] == 7).all()
    assert tuple(out[0, 0]) == tuple(out[-1, -1]) == images.RIGHT


def test_shrunk_never_enlarges():
    assert images.shrunk(image(1, 40, 80), 20).shape == (10, 20, 3)
    assert images.shrunk(image(1, 4, 900), 90).shape == (1, 90, 3)
    assert images.shrunk(image(), 100).shape == (20, 20, 3)


def test_data_uris_hold_the_image():
    image = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    kind, data = images.to_png_data_uri(image).split(",")
    assert kind == "data:image/png;base64"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(decoded, image)
    assert images.to_jpeg_data_uri(image).startswith("data:image/jpeg;base64,")


def test_results_sheet_frames_by_correctness():
    name = "a/very/long/path/that/cannot/fit/under/a/image.jpg"
    results = [(image(90, 30, 15), name, 0.9, correct) for correct in (True, False, None)]
    sheet = images.results_sheet(image(120, 10, 40), results)
    pixels = {tuple(pixel) for pixel in sheet.reshape(-1, 3).tolist()}
    assert {images.RIGHT, images.WRONG, images.INK} <= pixels
    unknown = images.results_sheet(image(), results[2:])
    assert images.RIGHT not in {tuple(pixel) for pixel in unknown.reshape(-1, 3).tolist()}
    assert images.results_sheet(image(), []).shape[0] > 0
    assert (
        images.results_sheet(image(), results * 4).shape[1]
        == (images.results_sheet(image(), results * 2).shape[1])
    )


# ---- charts -----------------------------------------------------------------------------------


def test_a_point_that_is_not_finite_interrupts_the_line():
    line = charts.Line("l", [(0, 1), (1, 2), (2, math.nan), (3, 1), (4, math.inf), (5, 2), (6, 3)])
    svg = ET.fromstring(charts.line_chart([line], "d & <e>"))
    assert svg.attrib["aria-label"] == "d & <e>"
    (path,) = [p for p in svg.iter("path") if p.get("fill") == "none"]
    assert path.attrib["d"].count("M") == 3
    assert len(list(svg.iter("g"))) == 1  # the point alone between two gaps is a dot


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [3e-4, 3e-4], [1e6, 2e9], [-5.0, 5.0]])
def test_charts_of_any_range_are_finite_and_the_same_twice(values):
    line = charts.Line("l", list(enumerate(values)), strong=True)
    svg = charts.line_chart([line], "d")
    assert svg == charts.line_chart([line], "d")
    assert "nan" not in svg and "inf" not in svg
    labels = [t.text for t in ET.fromstring(svg).iter("text")]
    assert len(labels) >= 4 and len(set(labels)) > 2


def test_training_charts_group_and_pair_the_figures():
    history = [
        {"step": s, "time": 0.1, "stage": "a" if s < 300 else "b", "loss": 1 / s, "d_real": 0.5,
         "d_fake": 0.4, "validation/x/recall_at_1": 0.5, "validation/fused/recall_at_1": 0.6,
         "psnr_in/contrast": 10, "psnr_out/contrast": 12, "images_per_second": 100}
        for s in range(1, 500)
    ]  # fmt: skip
    groups = dict(charts.training_charts(history))
    assert list(groups) == [title for title, _ in charts.GROUPS]
    (retrieval,) = groups["Retrieval on validation classes"]
    assert (retrieval.title, retrieval.tag) == ("R@1", "%")
    assert [name for name, _ in retrieval.legend] == ["x", "fused"]
    networks = [(c.title, [name for name, _ in c.legend]) for c in groups[charts.GROUPS[2][0]]]
    assert networks == [
        ("D on real / fake", ["real", "fake"]),
        ("contrast", ["PSNR in", "PSNR out"]),
    ]
    assert charts.stage_starts(history) == [(0, "a"), (299, "b")]
    (path,) = re.findall(r'd="(M[^"]*)" fill="none"', groups["Losses"][0].svg)
    assert path.count("L") < charts.POINTS
    assert charts.training_charts([]) == []


def test_robustness_charts_put_held_back_last_and_start_at_clean():
    scores = {"A": {"rain": {1: 0.5, 5: 0.25}, "noise": {1: 0.6}}, "B": {"noise": {1: math.nan}}}
    drawn, legend = charts.robustness_charts(scores, {"A": 0.75}, ["rain"], "B")
    assert [(c.title, c.tag) for c in drawn] == [("noise", "trained"), ("rain", "held back")]
    assert [name for name, _ in legend] == ["B", "A"]
    assert "A 75.0 %, 50.0 %, 25.0 %" in drawn[1].svg and ">clean<" in drawn[1].svg
    assert charts.robustness_charts({}, {}, [], "")[0] == []


# ---- the page ---------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Collects tags and text; checks that tags are closed in order."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self):
        super().__init__()
        self.tags, self.stack, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page(**parts):
    head = {
        "title": "Run", "experiment": "debug", "dataset": "synthetic", "protocol": "One sentence.",
        "hardware": "1 x cpu", "date": "2026-01-01", "commit": "0123456789abcdef", "seeds": [0],
        "train_seconds": 61.0, "parameters": {"F": 1234567},
    }  # fmt: skip
    return Page(**(head | parts))


def further(auroc, missed):
    return {
        "cmc": [0.5, 0.625, 0.75, 0.75, 0.875],
        "recall_at_1_over_ties": 0.5,
        "pairs": {"auroc": auroc, "fnmr_at_fmr": {"0.01": missed}, "same": 10, "different": 200},
        "clusters": {"nmi": 0.7, "ami": -0.06, "clusters": 4, "images": 40},
    }


def full_page(name="Fused"):
    hits = [Hit(image(), f"{name}{i}", 0.5, c) for i, c in enumerate((True, False, None))]
    row = QueryRow(image(), name, name, hits, "gaussian_noise")
    return page(
        title=name, dataset=name, protocol=name, facts={name: name}, notes=[name],
        highlight=name, reference="F",
        rows=[
            ResultRow("F", 1.0, {"recall_at_1": 0.76, "map_at_r": 0.4}, {"recall_at_1": 0.5},
                      extra=further(0.9123, 0.25)),
            ResultRow(name, 2.0, {"recall_at_1": 0.808, "map_at_r": 0.3999},
                      extra=further(0.9377, 0.125)),
            ResultRow("Raw", None, {"recall_at_1": math.nan}),
        ],
        queries=[row], failures=[row],
        restorations=[Restoration(name, image(), image(), image(), 20.0, 19.0)],
        restored={"clean": {"psnr_in": 60.0, "psnr_out": 36.25},
                  "blur": {"psnr_in": 25.0, "psnr_out": 24.5},
                  "noise": {"psnr_in": 20.0, "psnr_out": 23.0}},
        samples=[image(9, 32, 32)] * 3,
        history=[{"step": s, "time": 0, "stage": name, "loss": 1.0, name: 2.0} for s in (1, 2)],
        robustness={name: {name: {1: 0.5, 2: 0.4}}}, held_back=[name],
        search=SearchFacts(
            name, 10, 0.991, 1500.0, 900.0, 100, 8, {name: name}, 0.98, [(0.97, 2e3), (0.99, 1e3)]
        ),
    )  # fmt: skip


def read(tmp_path, content):
    write_report(tmp_path / "report.html", content)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.stack == []
    return text, reader


def test_the_page_shows_what_it_was_given(tmp_path):
    text, reader = read(tmp_path, full_page())
    words = re.sub(r"\s+", " ", " ".join(reader.text))
    for part in (
        "Microseconds per query by recall", "tuned for 98 %",
        "80.8", "+4.8 points against F", "1,234,567", "1m 01s", "0123456789ab", "99.1 %",
        "1 of 2 right", "20.0 → 19.0 dB", "\N{MINUS SIGN}1.0", "gaussian noise", "held back",
    ):  # fmt: skip
        assert part in words, part
    assert '<td class="first best">80.8</td>' in text
    for part in ("FNMR at FMR", "1 %", "AUROC", "AMI", "Right by rank (CMC)"):
        assert part in words, part
    assert '<td class="first best">93.8</td>' in text and ">91.2</td>" in text
    assert 'first best">12.5</td>' in text and 'first">25.0</td>' in text  # the fewest errors
    assert text.count(' best">70.0</td>') == 2
    assert text.count(' best">\N{MINUS SIGN}6.0</td>') == 2
    assert "Fused 50.0 % at 1, 87.5 % at 5" in text
    assert text.count('best">40.0') == 2  # 0.4 and 0.3999 print alike: both are the best
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_page_sends_no_requests(tmp_path):
    text, reader = read(tmp_path, full_page())
    for tag, attributes in reader.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    assert "default-src 'none'" in text


def test_untrusted_names_are_escaped(tmp_path):
    text, reader = read(tmp_path, full_page(HOSTILE))
    assert "<script" not in text
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert HOSTILE in " ".join(reader.text)


def test_every_image_and_chart_has_a_text_alternative(tmp_path):
    _, reader = read(tmp_path, full_page())
    images_ = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images_) == 2 * 4 + 3 + 3
    assert all(attributes["alt"] for attributes in images_)
    assert "Result 2, wrong: Fused1" in [re.sub(" +", " ", a["alt"]) for a in images_]
    for tag, attributes in reader.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"


def test_empty_parts_say_so(tmp_path):
    _, reader = read(tmp_path, page())
    assert sum(a.get("class") == "none" for _, a in reader.tags) == 8
    assert sum(tag == "section" for tag, _ in reader.tags) == 8


def test_large_images_become_small(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8)
    read(tmp_path, page(samples=[image] * 8))
    assert (tmp_path / "report.html").stat().st_size < 120_000


def test_the_page_says_which_images_the_generator_makes_worse(tmp_path):
    text, _ = read(tmp_path, full_page())
    rows = [re.sub(r"<[^>]*>", " ", row).split()
            for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)]  # fmt: skip
    assert ["clean", "\N{EN DASH}", "36.2", "\N{EN DASH}"] in rows
    assert ["blur", "25.0", "24.5", "-0.5:", "worse"] in rows
    assert ["noise", "20.0", "23.0", "+3.0"] in rows
