"""Comparing finished runs: `experiments.compare`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import stdtrit

from afa.errors import UserError
from afa.runs import summarise as summarise_module
from afa.runs.compare import CONDITIONS, Run, compare
from afa.runs.summarise import summarise, together
from experiments import compare as command


@pytest.fixture
def worse(tiny_finished, tmp_path):
    """A run whose variant "fused" has three quarters of its MAP@R on every query."""
    workdir = tmp_path / "worse"
    workdir.mkdir()
    for name in ("result.json", "per_query.parquet"):
        shutil.copy(tiny_finished / name, workdir)
    table = pq.read_table(workdir / "per_query.parquet")
    fused = table["variant"].to_numpy() == "fused"
    values = np.where(fused, 0.75, 1.0) * table["map_at_r"].to_numpy()
    place = table.column_names.index("map_at_r")
    pq.write_table(
        table.set_column(place, "map_at_r", pa.array(values)), workdir / "per_query.parquet"
    )
    return workdir


def changed(workdir, change):
    result = json.loads((workdir / "result.json").read_text())
    change(result)
    (workdir / "result.json").write_text(json.dumps(result))


def another(home, tmp_path):
    """A run with the figures of this one, as another seed might have."""
    copy = Path(shutil.copytree(home, tmp_path / "another"))
    changed(copy, lambda result: result.update(seed="another"))
    return copy


def test_means_are_those_of_the_runs_own_table(tiny_finished):
    run = Run.load(tiny_finished)
    lines = compare([run], [run])
    table = json.loads((tiny_finished / "result.json").read_text())["metrics"]["test"]
    assert {line.condition for line in lines} == set(CONDITIONS)
    for line in lines:
        expected = table[line.variant][line.protocol][line.condition]["map_at_r"]
        assert line.first == line.second == pytest.approx(expected)
        assert (line.classes.mean, line.p, line.seeds) == (0, 1, None)


def test_only_changed_metrics_differ(tiny_finished, worse):
    first, second = Run.load(tiny_finished), Run.load(worse)
    for line in compare([first, first], [second, second]):
        assert line.seeds is not None
        assert line.seeds.mean == pytest.approx(line.classes.mean)
        if line.variant == "fused":
            assert line.classes.mean == pytest.approx(0.25 * line.first)
            assert 0 < line.classes.low <= line.classes.mean <= line.classes.high
        else:
            assert line.classes.mean == 0


def test_the_command_prints_and_writes_the_table(tiny_finished, worse, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = [str(tiny_finished), "--against", str(worse), "--variant", "fused", "--out", str(out)]
    assert command.main(words) == 0
    printed = capsys.readouterr().out
    lines = json.loads(out.read_text())["lines"]
    assert lines
    for line in lines:
        assert line["variant"] == "fused"
        assert f"{100 * line['classes']['mean']:+.1f}" in printed
        assert line["condition"] in printed


def refused(words, capsys):
    assert command.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_errors_are_reported(tiny_finished, worse, tmp_path, capsys):
    run = tiny_finished
    assert "2 runs against 1: they are compared in pairs" in refused(
        [run, another(run, tmp_path), "--against", worse], capsys
    )
    assert "is not a finished run (" in refused([run, "--against", tmp_path], capsys)
    message = refused([run, "--against", worse, "--metric", "map_at"], capsys)
    assert "--metric" in message and "map_at_r" in message
    message = refused([run, "--against", worse, "--variant", "fusde"], capsys)
    assert "--variant" in message and "fused" in message
    missing = tmp_path / "no" / "x.json"
    assert "does not exist" in refused([run, "--against", worse, "--out", missing], capsys)


def test_runs_on_other_images_or_queries_are_refused(tiny_finished, worse, capsys):
    table = pq.read_table(worse / "per_query.parquet")
    renamed = pa.array([f"x{name}" for name in table["query"].to_pylist()])
    place = table.column_names.index("query")
    pq.write_table(table.set_column(place, "query", renamed), worse / "per_query.parquet")
    assert "the runs have different queries" in refused([tiny_finished, "--against", worse], capsys)
    changed(worse, lambda result: result["data"].update(test_fingerprint="another"))
    message = refused([tiny_finished, "--against", worse], capsys)
    assert "differ in test_fingerprint, 'another'" in message
    (worse / "per_query.parquet").write_bytes(b"PAR1")
    assert "is damaged" in refused([tiny_finished, "--against", worse], capsys)
    assert np.isfinite(Run.load(tiny_finished).columns["map_at_r"]).any()


# ---- runs of one kind ----------------------------------------------------------------------------


def test_the_mean_of_several_runs_and_both_intervals(tiny_finished, worse):
    first, second = Run.load(tiny_finished), Run.load(worse)
    table = json.loads((tiny_finished / "result.json").read_text())["metrics"]["test"]
    lines = summarise([first, second, first])
    assert {line.condition for line in lines} == set(CONDITIONS)
    for line in lines:
        whole = table[line.variant][line.protocol][line.condition]["map_at_r"]
        part = 0.75 * whole if line.variant == "fused" else whole
        assert line.each == (pytest.approx(whole), pytest.approx(part), pytest.approx(whole))
        assert line.mean == pytest.approx((2 * whole + part) / 3)
        assert line.classes.low <= line.classes.mean <= line.classes.high
        assert line.classes.mean == pytest.approx(line.mean)
        assert line.runs is not None
        spread = abs(whole - part) / np.sqrt(3) / np.sqrt(3)
        half = line.runs.high - line.runs.mean
        assert half == pytest.approx(stdtrit(2, 0.975) * spread, abs=1e-12)
    assert all(line.runs is None for line in summarise([first]))


def test_an_ensemble_of_equal_runs_equals_each_run(tiny_finished):
    run = Run.load(tiny_finished)
    table = json.loads((tiny_finished / "result.json").read_text())["metrics"]["test"]["fused"]
    for metric in ("map_at_r", "recall_at_1"):
        lines = together([run, run, run], metric)
        assert [line.protocol for line in lines] == ["leave_one_out", "catalogue"]
        for line in lines:
            expected = table[line.protocol]["clean"][metric]
            assert line.mean == line.classes.mean == pytest.approx(expected)
            assert (line.variant, line.condition) == ("fused, together", "clean")


def test_each_protocol_is_searched_in_its_own_gallery(tiny_finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(tiny_finished, tmp_path / "fewer")
    split = json.loads((workdir / "split.json").read_text())
    test = split["splits"]["test"]
    assert set(test["catalogue"]) < set(test["ids"]) and "gallery" not in test
    run, sizes, rank = Run.load(workdir), [], summarise_module.positive_ranks

    def noted(queries, gallery, *rest):
        sizes.append((len(queries), len(gallery)))
        return rank(queries, gallery, *rest)

    monkeypatch.setattr(summarise_module, "positive_ranks", noted)
    together([run, run])
    wild = len(test["ids"]) - len(test["catalogue"])
    assert sizes == [(wild, wild), (wild, len(test["catalogue"]))]
    test["catalogue"] = test["catalogue"][:2]
    (workdir / "split.json").write_text(json.dumps(split))
    together([run, run])
    assert sizes[3] == (wild, 2)
    del test["catalogue"]
    (workdir / "split.json").write_text(json.dumps(split))
    with pytest.raises(UserError, match="needs catalogue images"):
        together([run, run])


def test_other_severities_are_not_compared(tiny_finished, tmp_path):
    workdir = tmp_path / "other"
    workdir.mkdir()
    shutil.copy(tiny_finished / "result.json", workdir)
    table = pq.read_table(tiny_finished / "per_query.parquet")
    severity = table["severity"].to_numpy()
    place = table.column_names.index("severity")
    milder = pa.array(np.where(severity > 0, severity - 1, 0))
    pq.write_table(table.set_column(place, "severity", milder), workdir / "per_query.parquet")
    with pytest.raises(UserError, match=r"different corruptions or severities \(evaluation\.sev"):
        compare([Run.load(tiny_finished)], [Run.load(workdir)])


def test_the_command_summarises_runs_of_one_kind(tiny_finished, worse, tmp_path, capsys):
    out = tmp_path / "out.json"
    runs = [str(tiny_finished), str(another(tiny_finished, tmp_path))]
    words = [*runs, "--together", "--variant", "fused", "--out", str(out)]
    assert command.main(words) == 0
    printed = capsys.readouterr().out
    lines = json.loads(out.read_text())["lines"]
    assert {line["variant"] for line in lines} == {"fused", "fused, together"}
    for line in lines:
        assert f"{100 * line['mean']:.1f}" in printed
    assert "map_at_r, percent; 2 runs" in printed


def test_errors_of_summaries_are_reported(tiny_finished, tiny_copy, worse, capsys):
    run = tiny_finished
    message = refused([run, "--against", worse, "--together"], capsys)
    assert "--together and --against exclude each other" in message
    assert "--together needs at least 2 runs" in refused([run, "--together"], capsys)
    assert "worse/split.json: is not a stored split" in refused([worse, run, "--together"], capsys)
    changed(worse, lambda result: result["data"].pop("test_fingerprint"))
    assert "was written by an earlier version" in refused([run, worse], capsys)
    split = json.loads((tiny_copy / "split.json").read_text())
    split["splits"]["test"]["ids"][3] = "somewhere/else.jpg"
    (tiny_copy / "split.json").write_text(json.dumps(split))
    changed(tiny_copy, lambda result: result.update(seed="another"))
    told = refused([tiny_copy, run, "--together"], capsys)
    assert "its embeddings lack 'somewhere/else.jpg'" in told


@pytest.mark.parametrize("against", [False, True])
def test_a_run_given_twice_is_refused(against, tiny_finished, worse, tmp_path, capsys):
    """Also by another path, and as a copy: the interval over runs would be of one."""
    copy = shutil.copytree(tiny_finished, tmp_path / "copy")
    for same in (tiny_finished, tiny_finished / ".." / tiny_finished.name, copy):
        others = ["--against", str(same)] if against else [str(same), str(worse)]
        assert command.main([str(tiny_finished), *others]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("the same run is given twice; give each run once\n")
        assert err.startswith(f"error: {tiny_finished}")


@pytest.mark.parametrize("part", ["config", "data"])
def test_a_result_that_lacks_something_is_told(part, worse, capsys):
    changed(worse, lambda result: result.pop(part))
    assert command.main([str(worse)]) == 2
    assert capsys.readouterr().err == (
        f"error: {worse}/result.json is damaged: it lacks {part!r}\n"
    )
