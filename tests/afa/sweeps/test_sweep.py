"""Execution of sweeps: every run once, also if the sweep is killed; failures; other plans."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from paths import ROOT
from sweep_worker import COMMAND as WORKER

from afa.errors import UserError
from afa.io import locked
from afa.sweeps.executors.local import Local
from afa.sweeps.plan import plan
from afa.sweeps.sweep import Sweep, execute, summarise

# Executes a sweep of twelve runs, as a process that can be killed.
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_sweep import twelve, execute, Local, WORKER
execute(twelve(Path(sys.argv[1])), Local(2, WORKER), lambda states: None)
"""


def twelve(root):
    """Two losses, two learning rates, three seeds."""
    changes = [{"loss.name": loss, "optim.learning_rate": rate}
               for loss in ("norm_softmax", "arcface") for rate in (1e-3, 3e-4)]  # fmt: skip
    return Sweep(plan(["debug"], changes, range(3), "laptop"), root / "sweep", root / "store")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def starts(root):
    """Number of starts of every run."""
    return {path.parent.name: len(path.read_text().split())
            for path in (root / "store").glob("*/started")}  # fmt: skip


def test_a_sweep_executes_every_run_once(tmp_path):
    sweep, seen = twelve(tmp_path), []
    states = execute(sweep, Local(2, WORKER), lambda states: seen.append(dict(states)))
    assert states == {run.name: "done" for run in sweep.runs}
    assert starts(tmp_path) == {run.name: 1 for run in sweep.runs}
    assert max(Counter(each.values())["running"] for each in seen) == 2
    rows = summarise(sweep)["runs"]
    assert [row["name"] for row in rows] == [run.name for run in sweep.runs]
    assert rows[0]["metrics"]["fused"]["optim.learning_rate"] == "0.001"


def test_a_run_whose_process_still_works_is_not_started(tmp_path):
    """As after a sweep was killed while its runs save their state."""
    sweep = twelve(tmp_path)
    first, *others = [run.name for run in sweep.runs]
    (sweep.store / first).mkdir(parents=True)
    released = []
    with contextlib.ExitStack() as working:
        working.enter_context(locked(sweep.store / first / ".lock"))

        def show(states):
            if all(states[name] == "done" for name in others) and not released:
                assert states[first] == "waiting"
                released.append(first)
                working.close()

        states = execute(sweep, Local(2, WORKER), show)
    assert set(states.values()) == {"done"} and sweep.failures() == {}
    assert starts(tmp_path)[first] == 1


def test_a_sweep_killed_ten_times_ends_as_an_undisturbed_one(tmp_path):
    undisturbed = twelve(tmp_path / "undisturbed")
    execute(undisturbed, Local(2, WORKER), lambda states: None)
    home, draw = tmp_path / "killed", random.Random(0)
    program = PROGRAM.format(here=str(Path(__file__).parent))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    }
    begun = [sys.executable, "-c", program, str(home)]
    for _ in range(10):
        process = subprocess.Popen(begun, env=environment)
        time.sleep(draw.uniform(0.3, 2.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(begun, env=environment).returncode == 0
    sweep = twelve(home)
    assert len(sweep.done()) == 12
    assert json.dumps(summarise(sweep)) == json.dumps(summarise(undisturbed)).replace(
        str(undisturbed.store), str(sweep.store)
    )
    assert not sweep.failures()


def test_a_run_of_another_sweep_is_not_repeated(tmp_path):
    first = Sweep(plan(["debug"], [{}], range(2), "laptop"), tmp_path / "first", tmp_path / "store")
    execute(first, Local(2, WORKER), lambda states: None)
    second = Sweep(plan(["debug"], [{}], range(3), "laptop"), tmp_path / "second", first.store)
    assert second.done() == second.runs[:2]
    execute(second, Local(1, WORKER), lambda states: None)
    assert set(starts(tmp_path).values()) == {1}


def test_a_run_of_equal_settings_in_another_experiment_is_not_repeated(tmp_path):
    sweep = twelve(tmp_path)
    first = sweep.runs[0]
    other = sweep.store / f"other-{first.digest}"
    other.mkdir(parents=True)
    (other / "result.json").write_text(json.dumps({"metrics": {"test": {"fused": "other"}}}))
    assert execute(sweep, Local(2, WORKER), lambda states: None)[first.name] == "done"
    assert first.name not in starts(tmp_path)
    assert summarise(sweep)["runs"][0]["metrics"] == {"fused": "other"}


def test_a_preempted_run_continues_and_has_not_failed(tmp_path):
    sweep = Sweep(plan(["debug"], [{}], [15], "laptop"), tmp_path / "sweep", tmp_path / "store")
    (run,) = sweep.runs
    assert execute(sweep, Local(1, WORKER), lambda states: None) == {run.name: "done"}
    assert starts(tmp_path) == {run.name: 4} and sweep.failures() == {}


def test_a_failed_run_is_retried_once_and_again_by_the_next_command(tmp_path):
    sweep = Sweep(plan(["debug"], [{}], (12, 13), "laptop"), tmp_path / "out", tmp_path / "store")
    good, bad = (run.name for run in sweep.runs)
    assert execute(sweep, Local(1, WORKER), lambda _: None) == {good: "done", bad: "failed"}
    reason = "error: seed 13 is unlucky (exit code 2)"
    assert sweep.failures() == {bad: [reason, reason]}
    assert summarise(sweep)["failed"] == {bad: [reason, reason]}
    sweep.summary.write_text("{}")
    execute(sweep, Local(1, WORKER), lambda _: None)
    assert starts(tmp_path) == {good: 1, bad: 4}
    assert sweep.failures() == {bad: [reason, reason]}


def test_a_directory_of_another_plan_is_refused(tmp_path):
    first, second = (plan(["debug"], [{}], seeds, "laptop") for seeds in (range(2), range(1, 4)))
    Sweep(first, tmp_path, tmp_path / "store").claim()
    with pytest.raises(UserError) as error:
        Sweep(second, tmp_path, tmp_path / "store").claim()
    assert str(error.value) == (
        f"--out={tmp_path} contains another plan: 1 of its runs are not in this one, 2 are new "
        "(choose another --out)"
    )


def test_a_second_process_is_refused(tmp_path):
    sweep = twelve(tmp_path)
    sweep.out.mkdir(parents=True)
    with locked(sweep.out / ".lock"), pytest.raises(UserError, match="another process executes"):
        execute(sweep, Local(1, WORKER), lambda _: None)
