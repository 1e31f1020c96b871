"""Tables over many runs: `experiments.results`."""

import csv
import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afa.errors import UserError
from afa.evaluation import statistics
from afa.runs import results
from afa.workdir import Workdir
from experiments import results as command

KEY = ("fused", "leave_one_out", "clean")
# Learning rate -> factor of each seed.
FACTORS = {0.001: (1.0, 0.9, 0.8, 0.7, 0.6), 0.002: (0.5,) * 5, 0.003: (0.4,) * 5}


def made(finished, home, rate, seed, factor):
    """A run of a learning rate and a seed, with its MAP@R times a factor on every query."""
    home.mkdir(parents=True)
    for name in ("result.json", "per_query.parquet", "config.json"):
        shutil.copy(finished / name, home)
    shutil.copytree(finished / "embeddings", home / "embeddings")
    for name in ("result.json", "config.json"):
        content = json.loads((home / name).read_text())
        content["config"]["seed"] = seed
        content["config"]["optim"]["learning_rate"] = rate
        (home / name).write_text(json.dumps(content))
    table = pq.read_table(home / "per_query.parquet")
    place = table.column_names.index("map_at_r")
    values = pa.array(factor * table["map_at_r"].to_numpy())
    pq.write_table(table.set_column(place, "map_at_r", values), home / "per_query.parquet")
    return home


@pytest.fixture(scope="module")
def runs(tiny_finished, tmp_path_factory):
    """Rate -> runs of seeds 0 to 4."""
    root = tmp_path_factory.mktemp("results")
    return {
        rate: [
            made(tiny_finished, root / f"{rate}-{seed}", rate, seed, factor)
            for seed, factor in enumerate(FACTORS[rate])
        ]
        for rate in FACTORS
    }


@pytest.fixture(scope="module")
def plain(tiny_finished):
    """MAP@R of the run that all others are made of."""
    table = json.loads((tiny_finished / "result.json").read_text())["metrics"]["test"]
    return table["fused"]["leave_one_out"]["clean"]["map_at_r"]


def test_means_intervals_and_differences(runs, plain):
    groups = results.groups([*runs[0.001], *runs[0.002]], ["optim.learning_rate"])
    names = [group.name for group in groups]
    assert names == ["debug optim.learning_rate=0.001", "debug optim.learning_rate=0.002"]
    first, second = results.compared(groups, names[1], KEY, "map_at_r")
    each = plain * np.array(FACTORS[0.001])
    assert first.each == pytest.approx(tuple(each))
    assert first.iqm == pytest.approx(statistics.interquartile_mean(each))
    assert first.difference is not None and first.difference.mean == pytest.approx(0.3 * plain)
    assert first.differences == pytest.approx(tuple(each - 0.5 * plain))
    assert first.improvement == 1.0
    assert (second.difference, second.p, second.improvement) == (None, None, None)
    table = results.by_group(groups, [first, second], "fused").texts()
    mean, half = statistics.mean_and_interval(each)
    assert table[1][2] == f"{100 * mean:.1f} ± {100 * half:.1f}"
    assert table[2][2] == f"{50 * plain:.1f}"  # no spread


def test_no_interval_from_fewer_than_three_seeds(runs, plain):
    groups = results.groups([*runs[0.001][:2], *runs[0.002][:3]], ["optim.learning_rate"])
    first, second = results.compared(groups, groups[1].name, KEY, "map_at_r")
    assert first.iqm is None and second.iqm is None
    assert first.difference is not None  # over the two seeds in common
    assert first.difference.mean == pytest.approx((0.95 - 0.5) * plain)
    assert "±" not in results.by_group(groups, [first, second], "fused").texts()[1][2]


def test_differences_are_those_of_equal_seeds(runs, plain):
    """Seeds 1, 2, 3 against 0, 1, 2: the differences are those of seeds 1 and 2."""
    chosen = [*runs[0.002][1:4], *runs[0.001][:3]]
    groups = results.groups(chosen, ["optim.learning_rate"])
    row, _ = results.compared(groups, groups[1].name, KEY, "map_at_r")
    assert row.differences == pytest.approx(((0.5 - 0.9) * plain, (0.5 - 0.8) * plain))
    assert row.difference is not None
    assert row.difference.mean == pytest.approx((0.5 - 0.85) * plain)


def test_p_values_are_adjusted_for_the_table(runs, monkeypatch):
    monkeypatch.setattr(results.statistics, "sign_flip", lambda *args: 0.02)
    every = [run for rate in FACTORS for run in runs[rate]]
    groups = results.groups(every, ["optim.learning_rate"])
    rows = results.compared(groups, groups[0].name, KEY, "map_at_r")
    assert [row.p for row in rows] == [None, 0.04, 0.04]


def test_runs_of_a_group_differ_in_their_seed_alone(runs):
    with pytest.raises(UserError) as error:
        results.groups([runs[0.001][0], runs[0.002][1]], [])
    assert str(error.value) == (
        f"{runs[0.001][0]} and {runs[0.002][1]}: both are debug, but differ in "
        "optim.learning_rate; name the field with --by"
    )
    with pytest.raises(UserError, match="both are debug with seed 0"):
        results.groups([runs[0.001][0], runs[0.002][0]], [])


def printed(words, capsys):
    assert command.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_the_command_writes_four_formats(runs, plain, tmp_path, capsys):
    words = [*runs[0.001], *runs[0.002], "--by=optim.learning_rate",
             "--against=debug optim.learning_rate=0.002"]  # fmt: skip
    out = tmp_path / "table.json"
    text = printed([*words, f"--out={out}"], capsys)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0][:3] == ["group", "seeds", "mean, over seeds"]
    assert rows[2][2].startswith(f"{80 * plain:.1f} ± ")
    stored = json.loads(out.read_text())
    assert stored["rows"][0][2]["values"] == pytest.approx(
        [f * plain for f in FACTORS[0.001]], 1e-5
    )
    assert stored["seeds"] == [0, 1, 2, 3, 4]
    assert stored["command"].startswith("python -m experiments.run --exp=debug --scale=laptop ")
    assert printed([out], capsys) == text
    table = [*csv.reader(io.StringIO(printed([*words, "--format=csv"], capsys)))]
    assert table == [rows[0], *rows[2:]]
    latex = printed([*words, "--format=latex"], capsys)
    assert r"debug optim.learning\_rate=0.001 & 5 & " in latex and r"$\pm$" in latex
    page = printed([*words, "--format=html"], capsys)
    assert page.count("<tr>") == 3 and f"<td>{rows[2][2]}</td>" in page


def test_tables_of_one_group(runs, plain, capsys):
    words = [*runs[0.001], "--table=variants", "--variant=raw pixels", "--variant=fused"]
    lines = printed(words, capsys).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["raw pixels", "fused"]
    assert (
        f" / {100 * plain:.1f} |" in lines[3]
    )  # of result.json, which the fixture leaves as it is
    lines = printed([*runs[0.001], "--table=restoration"], capsys).splitlines()
    assert lines[0] == "| corruption | before | after | gain |"
    assert any(line.startswith("| mean of the trained | | |") for line in lines)


def test_the_search_cost_of_a_table_is_the_mean_over_the_runs(runs):
    """Validation may have chosen a different fusion for each seed."""
    (group,) = results.groups(runs[0.001][:2], [])
    paid = [1.0, 1.5]
    for result, cost in zip(group.results, paid, strict=True):
        result["metrics"]["test"]["fused"]["cost"] = cost
    table = results.by_variant(group, "leave_one_out", ["map_at_r"], ["fused", "raw pixels"])
    assert [row[1] for row in table.rows] == [1.25, None]


def test_paired_differences_of_clean_and_corrupted_queries(runs, plain):
    """Result files of the fixture are equal, so their figures are changed here."""
    chosen = [*runs[0.001][:4], *runs[0.002][1:]]
    groups = results.groups(chosen, ["optim.learning_rate"])
    for group, added in zip(groups, (0.1, 0.0), strict=True):
        for seed, result in zip(group.seeds, group.results, strict=True):
            result["timings"]["training_steps"] = 10.0 + seed + 100 * (seed == 3)
            figures = result["metrics"]["test"]["fused"]["leave_one_out"]
            figures["held_back"] = {"recall_at_1": 0.2, "map_at_r": 0.1 + added * seed}
    metrics = ["recall_at_1", "map_at_r"]
    names = [group.name for group in groups]
    table = results.by_condition(groups, names[1], "fused", "leave_one_out", metrics)
    assert [column.name for column in table.columns[2:]] == [
        "search cost", "training, s", "clean queries", "trained corruptions",
        "held-back corruptions", "difference, clean queries", "difference, trained corruptions",
        "difference, held-back corruptions",
    ]  # fmt: skip
    first, second = table.rows
    assert (first[:2], second[:2]) == ([names[0], 4], [names[1], 4])
    assert (first[3], second[3]) == (11.5, 13.0)  # medians
    assert first[6][1]["values"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    # Seeds 1 to 3 are in both groups.
    assert first[9][1]["values"] == pytest.approx([0.1, 0.2, 0.3])
    assert first[9][0]["values"] == [0, 0, 0] and second[7:] == [None] * 3
    text = table.texts()[1]
    assert text[9] == "+0.0 / +20.0 ± 24.8"  # 4.30 (t, 2 degrees of freedom) * 10 / sqrt(3)
    alone = results.by_condition(groups, "", "fused", "leave_one_out", metrics)
    assert len(alone.columns) == len(alone.rows[0]) == 7
    with pytest.raises(UserError, match="have no seed in common"):
        results.by_condition(
            results.groups([runs[0.001][0], runs[0.002][1]], ["optim.learning_rate"]),
            names[1], "fused", "leave_one_out", metrics,
        )  # fmt: skip


def test_a_stored_command_has_no_directories(runs, tmp_path):
    home = shutil.copytree(runs[0.001][0], tmp_path / "run")
    content = json.loads((home / "config.json").read_text())
    content["config"]["backbone"]["weights"] = "/home/someone/weights.pth"
    content["config"]["data"] |= {"name": "folder", "path": "data/images"}
    (home / "config.json").write_text(json.dumps(content))
    table = results.by_variant(results.groups([home], [])[0], "leave_one_out", ["map_at_r"])
    assert " --backbone.weights=weights.pth" in table.command
    assert " --data.path=images" in table.command and "someone" not in table.command


def test_means_are_drawn(runs, plain, tmp_path, capsys):
    printed([*runs[0.001], "--plot", tmp_path / "means.svg"], capsys)
    drawn = (tmp_path / "means.svg").read_text()
    assert drawn.count("<circle") == 1 and f"<title>{80 * plain:.1f} %</title>" in drawn


def test_evaluations_on_test_classes_are_counted(runs, capsys):
    run = runs[0.001][0]
    command.main([str(run)])
    assert "evaluated 1 times for debug (1 runs)" in capsys.readouterr().err
    Workdir(run).count_test_read("run")
    Workdir(run).count_test_read("rerank")
    Workdir(run).count_test_read("rerank")
    command.main([str(run)])
    assert "evaluated 3 times for debug (1 runs)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by=optim.learning_rat"], "--by='optim.learning_rat' is unknown; did you mean"),
        (["--format=pdf"], "--format='pdf' is unknown"),
        (["--against=nothing"], "--against='nothing' is unknown"),
        (["--variant=fusde"], "did you mean 'fused / leave_one_out / clean'"),
        (["--table=variants", "--variant=fusde"], "--variant='fusde' is unknown; did you mean"),
        (["--table=variants", "--protocol=x"], "--protocol='x' is unknown"),
        (["--table=variants", "--plot=x.svg"], "--table=variants has no --plot and no --against"),
        (["--table=conditions", "--plot=x.svg"], "--plot needs --table=groups"),
        (["--table=conditions", "--against=nothing"], "--against='nothing' is unknown"),
        (["--table=conditions", "--variant=fusde"], "--variant='fusde' is unknown; did you mean"),
        (["--table=variant"], "--table='variant' is unknown; did you mean 'variants'"),
    ],
)
def test_mistakes_are_named(words, said, runs, capsys):
    assert command.main([*map(str, runs[0.001][:2]), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
