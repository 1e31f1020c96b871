"""Sweeps on a cluster, with `sbatch` and `squeue` of `support/fake_slurm.py`."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_commands
import pytest
from paths import ROOT
from sweep_worker import COMMAND as WORKER
from waiting import until

from afa.errors import EXIT_PREEMPTED, UserError
from afa.sweeps.executors.contract import Task
from afa.sweeps.executors.slurm import Slurm
from afa.sweeps.plan import plan
from afa.sweeps.sweep import Sweep, execute, summarise

PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{here!r}, {support!r}]
from test_slurm import six, execute, Slurm, WORKER
sweep = six(Path(sys.argv[1]))
execute(sweep, Slurm(sweep.out, command=WORKER), lambda states: None)
"""


def six(root):
    """Two learning rates, three seeds."""
    changes = [{"optim.learning_rate": rate} for rate in (1e-3, 3e-4)]
    return Sweep(plan(["debug"], changes, range(3), "laptop"), root / "sweep", root / "store")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Directory of a cluster whose commands are found first."""
    names = ("sbatch", "squeue", "scancel")
    return fake_commands.install("fake_slurm", names, tmp_path / "cluster", monkeypatch)


def test_runs_are_submitted_as_one_array(cluster, tmp_path):
    sweep = six(tmp_path)
    states = execute(sweep, Slurm(sweep.out, command=WORKER), lambda states: None)
    assert set(states.values()) == {"done"}
    assert sorted(path.name for path in (cluster / "jobs").iterdir()) == [
        f"100_{index}" for index in range(6)
    ]
    assert len(summarise(sweep)["runs"]) == 6


def test_a_killed_sweep_finds_its_jobs_again(cluster, tmp_path):
    program = PROGRAM.format(here=str(Path(__file__).parent), support=str(ROOT / "tests/support"))
    begun, draw = [sys.executable, "-c", program, str(tmp_path)], random.Random(1)
    for _ in range(5):
        process = subprocess.Popen(begun)
        time.sleep(draw.uniform(1, 5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(begun).returncode == 0
    sweep = six(tmp_path)
    assert len(sweep.done()) == 6 and not sweep.failures()
    started = [path.read_text().split() for path in sweep.store.glob("*/started")]
    assert [len(each) for each in started] == [1] * 6


def test_a_sweep_killed_between_submission_and_record_finds_its_job(cluster, tmp_path):
    sweep = six(tmp_path)
    record = sweep.out / "slurm" / "jobs.json"
    task = Task("debug-x", ["--seed=12", f"--workdir={tmp_path / 'x'}"], tmp_path / "x.log")
    first = Slurm(sweep.out, command=WORKER)
    first.start([task])
    (name,), job = json.loads(record.read_text()), 100
    record.write_text(json.dumps({name: {"job": "", "tasks": {"debug-x": 0}}}))
    again = Slurm(sweep.out, command=WORKER)
    assert json.loads(record.read_text())[name]["job"] == str(job)
    again.start([task])
    assert [path.name for path in (cluster / "jobs").iterdir()] == ["100_0"]
    assert until(again.ended) == {"debug-x": 0}


def test_a_task_stopped_by_slurm_is_submitted_again(cluster, tmp_path):
    executor = Slurm(tmp_path / "sweep", command=WORKER)
    words = ["--seed=14", f"--workdir={tmp_path / 'x'}"]  # runs until it is stopped
    executor.start([Task("debug-x", words, tmp_path / "x.log")])
    until((tmp_path / "x" / "started").exists)
    executor.cancel("debug-x")
    assert until(executor.ended) == {"debug-x": EXIT_PREEMPTED}


def test_a_dead_controller_is_one_line(cluster, tmp_path):
    (cluster / "dead").touch()
    sweep = six(tmp_path)
    with pytest.raises(UserError) as error:
        execute(sweep, Slurm(sweep.out, command=WORKER), lambda states: None)
    assert str(error.value) == ("sbatch: slurm_load_jobs error: Unable to contact slurm controller")
    assert json.loads((sweep.out / "slurm" / "jobs.json").read_text()) == {}
    assert json.loads((sweep.out / "plan.json").read_text())["runs"]


def test_without_slurm_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = six(tmp_path)
    with pytest.raises(UserError, match="sbatch is not found: this machine has no SLURM"):
        execute(sweep, Slurm(sweep.out, command=WORKER), lambda states: None)
