"""A run of two processes on the CPU: output, files, errors and exit."""

import itertools
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import process_worker
import pytest
import tiny_run
from paths import ROOT, SUPPORT

from afa import launchers, parallel
from experiments import run as command

WORKER = Path(process_worker.__file__)


def ended(running):
    """Waits for processes; returns ((stdout, stderr), exit code) of each."""
    try:
        return [(each.communicate(timeout=1500), each.returncode) for each in running]
    finally:
        for each in running:
            each.kill()
            each.communicate()  # closes its pipes


@pytest.fixture(scope="session")
def pair(tiny_data, tmp_path_factory):
    """The run directory of two processes, and the results of each."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, paths)), "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"] or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, WORKER, folder, tiny_data, str(index), str(port)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = ended(running)
    assert [code for _, code in outputs] == [0, 0], outputs
    found = [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]
    return folder / "run", found


def close(found, expected, path=""):
    """Asserts that nested metrics are equal up to rounding."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), path
        for name, each in expected.items():
            close(found[name], each, f"{path}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for number, pair in enumerate(zip(found, expected, strict=True)):
            close(*pair, f"{path}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4), path
    else:
        assert found == expected, path


def test_two_processes_have_the_results_of_one(pair, tiny_data, tmp_path):
    home, _ = pair
    assert tiny_run.main(*process_worker.words(tiny_data, tmp_path)) == 0
    close(tiny_run.figures(home), tiny_run.figures(tmp_path))
    for actual, other in zip(tiny_run.lines(home), tiny_run.lines(tmp_path), strict=True):
        close(actual, other)
    assert {path.name for path in home.iterdir()} == {path.name for path in tmp_path.iterdir()}
    assert tiny_run.result(home)["hardware"] == "2 x cpu"


def test_only_the_first_prints_and_logs(pair):
    home, (first, second) = pair
    assert "hardware  2 x cpu" in first["run"]["out"]
    assert first["run"]["out"].count("debug at laptop scale") == 1
    assert second["run"]["out"] == ""
    steps = [(line["step"], "loss" in line) for line in tiny_run.lines(home)]
    assert len(steps) == len(set(steps))  # no line was written twice
    assert len(list((home / "tensorboard").iterdir())) == 1


def test_an_error_in_the_first_process_ends_both(pair):
    _, found = pair
    codes, lines = zip(*((each["changed"]["code"], each["changed"]["err"]) for each in found),
                       strict=True)  # fmt: skip
    assert codes == (2, 2)
    assert lines[0] == lines[1]
    assert "contains a run with another configuration: seed: 0 -> 1" in lines[0]
    assert lines[0].count("\n") == 1
    assert max(each["changed"]["seconds"] for each in found) < 60


def test_communication_between_processes(pair):
    for index, each in enumerate(pair[1]):
        assert each["processes"] == [2, index]
        assert each["together"] == [10 + index, "process 0 cannot", "process 1 cannot"]
        assert each["clock_skew"] == pytest.approx(100.5, abs=0.4)
        assert each["first_only"] == [None if index else 1, "process 0 cannot"]
        assert each["from_first"] == {"index": 0, "text": "å", "list": [1.5, None]}


def test_rows_are_divided_and_concatenated_in_order(pair):
    shares = {1: ([0, 1], [0, 1]), 2: ([0, 1], [1, 2]), 5: ([0, 3], [3, 5]), 8: ([0, 4], [4, 8])}
    assert tuple(shares) == process_worker.ROWS
    for index, each in enumerate(pair[1]):
        for rows, expected in shares.items():
            actual, joined = each["rows"][str(rows)]
            assert actual == expected[index]
            assert joined["n"] == list(range(rows))
            np.testing.assert_array_equal(np.ravel(joined["x"]), np.arange(2 * rows))


def free_job():
    """A SLURM job number for which JAX chooses a free port."""
    while True:
        job = random.randrange(2**12)
        with socket.socket() as free:
            try:
                free.bind(("localhost", 65535 - 2**12 + 1 + job))
            except OSError:
                continue
            return job


def test_an_error_in_the_second_process_ends_both_under_slurm(tiny_data, tmp_path):
    """They are connected only by SLURM's variables, which pass the error to the first process."""
    job, running = free_job(), []
    for index, data in enumerate((tiny_data, tmp_path / "nowhere")):
        slurm = {
            "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2,
            "SLURM_PROCID": index, "SLURM_LOCALID": index, "SLURM_STEP_NUM_NODES": 1,
        }  # fmt: skip
        environment = {name: str(value) for name, value in slurm.items()}
        line = process_worker.words(data, tmp_path / "run")
        running.append(tiny_run.start(*line, JAX_PLATFORMS="cpu", XLA_FLAGS="", **environment))
    (first, code), (second, other) = ended(running)
    assert (code, other) == (2, 2), (first, second)
    errors = [[x for x in err.splitlines() if x.startswith("error:")] for _, err in (first, second)]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 1
    assert "nowhere" in errors[0][0]
    assert not (tmp_path / "run").exists()


# ---- without a second process ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a[1-4]",
          "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}, 4),
        # The script of a batch job, before `srun` starts the processes: one process.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1",
          "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 3),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ],
)  # fmt: skip
def test_number_of_processes_from_the_environment(monkeypatch, variables, count):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_WORKER")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launchers.processes(os.environ) == count


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),  # no launcher
        # One task for all GPUs of a node, a GPU for each task that sees all, or its own only.
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0",
          "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "2",
          "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "5"},
         [0]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "SLURM_GPUS_ON_NODE": "8"},
         [4, 5, 6, 7]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "1", "SLURM_GPUS_ON_NODE": "16",
          "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "1"}, None),  # no GPUs
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
    ],
)  # fmt: skip
def test_gpus_of_a_process(variables, gpus):
    assert launchers.local_gpus(variables) == gpus


def test_one_process_keeps_all_rows():
    rows = {"x": np.arange(3)}
    assert parallel.share(3) == slice(0, 3)
    assert parallel.gather_shares(rows, 3) is rows
    assert parallel.from_first(rows) is rows
    assert parallel.first_only(lambda: 5) == 5


@pytest.mark.parametrize(("count", "rows"), [(3, 7), (4, 5), (4, 4), (5, 16), (2, 1)])
def test_shares_cover_all_rows_once(monkeypatch, count, rows):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    shares = []
    for index in range(count):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(list(range(rows))[parallel.share(rows)])
    if rows < count:
        assert shares == [list(range(rows))] * count
        return
    assert list(itertools.chain(*shares)) == list(range(rows))


def test_the_number_of_processes_must_be_one(capsys):
    assert command.main(["--exp=debug", "--launch.processes=two"]) == 2
    assert "launch.processes and launch.index must be two whole numbers" in capsys.readouterr().err
