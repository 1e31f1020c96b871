"""Comparing finished runs: `experiments.compare`."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afa.evaluation.comparison import CONDITIONS, Run, compare
from experiments import compare as command


@pytest.fixture
def worse(tiny_finished, tmp_path):
    """A run whose fused row lost a quarter of its MAP@R on every query."""
    home = tmp_path / "worse"
    home.mkdir()
    for name in ("result.json", "per_query.parquet"):
        shutil.copy(tiny_finished / name, home)
    table = pq.read_table(home / "per_query.parquet")
    fused = table["row"].to_numpy() == "fused"
    values = np.where(fused, 0.75, 1.0) * table["map_at_r"].to_numpy()
    place = table.column_names.index("map_at_r")
    pq.write_table(
        table.set_column(place, "map_at_r", pa.array(values)), home / "per_query.parquet"
    )
    return home


def changed(home, change):
    result = json.loads((home / "result.json").read_text())
    change(result)
    (home / "result.json").write_text(json.dumps(result))


def test_means_are_those_of_the_runs_own_table(tiny_finished):
    run = Run.load(tiny_finished)
    lines = compare([run], [run])
    table = json.loads((tiny_finished / "result.json").read_text())["metrics"]["test"]
    assert {line.condition for line in lines} == set(CONDITIONS)
    for line in lines:
        expected = table[line.row][line.protocol][line.condition]["map_at_r"]
        assert line.first == line.second == pytest.approx(expected)
        assert (line.classes.mean, line.p, line.seeds) == (0, 1, None)


def test_only_what_changed_differs(tiny_finished, worse):
    first, second = Run.load(tiny_finished), Run.load(worse)
    for line in compare([first, first], [second, second]):
        assert line.seeds is not None
        assert line.seeds.mean == pytest.approx(line.classes.mean)
        if line.row == "fused":
            assert line.classes.mean == pytest.approx(0.25 * line.first)
            assert 0 < line.classes.low <= line.classes.mean <= line.classes.high
        else:
            assert line.classes.mean == 0


def test_the_command_prints_and_writes_the_table(tiny_finished, worse, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = [str(tiny_finished), "--against", str(worse), "--row", "fused", "--out", str(out)]
    assert command.main(words) == 0
    printed = capsys.readouterr().out
    lines = json.loads(out.read_text())["lines"]
    assert lines
    for line in lines:
        assert line["row"] == "fused"
        assert f"{100 * line['classes']['mean']:+.1f}" in printed
        assert line["condition"] in printed


def refused(words, capsys):
    assert command.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_mistakes_are_named(tiny_finished, worse, tmp_path, capsys):
    run = tiny_finished
    assert "2 runs against 1: they are compared in pairs" in refused(
        [run, run, "--against", worse], capsys
    )
    assert "is no finished run (" in refused([run, "--against", tmp_path], capsys)
    told = refused([run, "--against", worse, "--metric", "map_at"], capsys)
    assert "--metric" in told and "map_at_r" in told
    told = refused([run, "--against", worse, "--row", "fusde"], capsys)
    assert "--row" in told and "fused" in told
    missing = tmp_path / "no" / "x.json"
    assert "there is no directory" in refused([run, "--against", worse, "--out", missing], capsys)


def test_runs_on_other_pictures_or_queries_are_refused(tiny_finished, worse, capsys):
    table = pq.read_table(worse / "per_query.parquet")
    renamed = pa.array([f"x{name}" for name in table["query"].to_pylist()])
    place = table.column_names.index("query")
    pq.write_table(table.set_column(place, "query", renamed), worse / "per_query.parquet")
    assert "were not asked the same queries" in refused([tiny_finished, "--against", worse], capsys)
    changed(worse, lambda result: result["data"].update(test_fingerprint="another"))
    told = refused([tiny_finished, "--against", worse], capsys)
    assert "not measured on the same: test_fingerprint 'another'" in told
    (worse / "per_query.parquet").write_bytes(b"PAR1")
    assert "is damaged" in refused([tiny_finished, "--against", worse], capsys)
    assert np.isfinite(Run.load(tiny_finished).columns["map_at_r"]).any()
