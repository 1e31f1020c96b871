"""Sweeps as managed jobs of SkyPilot, with the command of `support/fake_sky.py`."""

import json

import fake_commands
import pytest
from sweep_worker import COMMAND as WORKER
from waiting import until

from afa.errors import UserError
from afa.sweeps.executors.contract import Task
from afa.sweeps.executors.sky import Sky
from afa.sweeps.plan import plan
from afa.sweeps.sweep import Sweep, execute


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Directory of a cloud whose command is found first."""
    return fake_commands.install("fake_sky", ("sky",), tmp_path / "cloud", monkeypatch)


def swept(root, seeds=(0, 1)):
    return Sweep(plan(["debug"], [{}], seeds, "laptop"), root / "sweep", root / "store")


def test_runs_are_managed_jobs_and_a_failed_one_is_retried(cloud, tmp_path):
    sweep = swept(tmp_path, (0, 13))
    good, bad = (run.name for run in sweep.runs)
    states = execute(sweep, Sky(sweep.out, command=WORKER), lambda states: None)
    assert states == {good: "done", bad: "failed"}
    assert sorted(path.name for path in (cloud / "jobs").iterdir()) == sorted(
        [f"{good}-1", f"{bad}-1", f"{bad}-2"]
    )
    line = f"sky jobs logs --name={bad}-2 prints the output (exit code 1)"
    assert sweep.failures()[bad][-1] == line


def test_jobs_of_a_killed_sweep_are_found_again(cloud, tmp_path):
    task = Task("debug-x", ["--seed=12", f"--workdir={tmp_path / 'x'}"], tmp_path / "x.log")
    Sky(tmp_path, command=WORKER).start([task])
    again = Sky(tmp_path, command=WORKER)
    again.start([task])
    assert [path.name for path in (cloud / "jobs").iterdir()] == ["debug-x-1"]
    assert until(again.ended) == {"debug-x": 0}


def test_a_job_that_was_recorded_but_not_launched_is_launched(cloud, tmp_path):
    task = Task("debug-x", ["--seed=12", f"--workdir={tmp_path / 'x'}"], tmp_path / "x.log")
    record = tmp_path / "sky" / "jobs.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"attempts": {"debug-x": 1}, "running": ["debug-x"]}))
    executor = Sky(tmp_path, command=WORKER)
    assert executor.ended() == {}
    executor.start([task])
    assert [path.name for path in (cloud / "jobs").iterdir()] == ["debug-x-1"]


def test_a_dead_server_is_one_line(cloud, tmp_path):
    (cloud / "dead").touch()
    sweep = swept(tmp_path)
    with pytest.raises(UserError) as error:
        execute(sweep, Sky(sweep.out, command=WORKER), lambda states: None)
    assert str(error.value) == "sky: Could not connect to SkyPilot API server"


def test_a_job_is_cancelled(cloud, tmp_path):
    executor = Sky(tmp_path, command=WORKER)
    words = ["--seed=14", f"--workdir={tmp_path / 'x'}"]  # runs until it is stopped
    executor.start([Task("debug-x", words, tmp_path / "x.log")])
    until((tmp_path / "x" / "started").exists)
    executor.cancel("debug-x")
    assert until(executor.ended) == {"debug-x": 1}
