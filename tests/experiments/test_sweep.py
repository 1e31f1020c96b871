"""The command `experiments.sweep`: plans, suites, searches, mistakes, and a sweep of real runs."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT
from rich.console import Console
from sweep_worker import COMMAND as WORKER

import afa
from afa.io import PROGRAM_CACHE
from afa.sweeps import devices, progress, start
from afa.sweeps import sweep as sweeps
from afa.sweeps.executors.local import Local
from afa.sweeps.plan import plan
from experiments import sweep as command
from experiments.suites import SUITES, twice

DEBUG = ["--exp=debug", "--scale=laptop"]


@pytest.fixture(autouse=True)
def worker(monkeypatch):
    """Runs are those of `support/sweep_worker.py`."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    real = Local.__init__
    monkeypatch.setattr(
        Local, "__init__", lambda self, processes=0, command=WORKER: real(self, processes, command)
    )


def planned(*words):
    return command.planned(command.parser().parse_args(list(words)))


def test_a_plan_is_printed(tmp_path, capsys):
    words = [*DEBUG, "--set=loss.name=norm_softmax,arcface", "--seeds=2", f"--out={tmp_path / 'x'}"]
    assert command.main([*words, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("waiting")]) == 4
    assert lines[4] == "4 runs, 0 done"
    assert not (tmp_path / "x").exists()


def test_values_become_runs():
    runs = planned(*DEBUG, "--set=optim.learning_rate=1e-3,3e-4",
                   "--set=evaluation.views=flip,flip+median", "--seeds=1")  # fmt: skip
    assert [run.config.optim.learning_rate for run in runs] == [1e-3, 1e-3, 3e-4, 3e-4]
    assert [run.config.evaluation.views for run in runs[:2]] == [("flip",), ("flip", "median")]
    zipped = planned(*DEBUG, "--zip", "embedder.embedding_dim=16,32", "embedder.local_dim=8,16")
    sizes = [(run.config.embedder.embedding_dim, run.config.embedder.local_dim) for run in zipped]
    assert sizes == [(16, 8), (32, 16)]
    tuned = planned(*DEBUG, "--tune", "--seeds=3")
    assert len(tuned) == 12


@pytest.mark.parametrize("name", SUITES)
def test_suites_can_be_planned(name):
    runs = planned(f"--suite={name}", "--scale=laptop")
    assert len(runs) >= 2 * SUITES[name].seeds or name == "smoke"
    assert {run.config.seed for run in runs} == set(range(SUITES[name].seeds))


def test_a_suite_about_another_method_and_data():
    words = ["--suite=rivals", "--scale=laptop", "--seeds=2"]
    changed = planned(*words, "--exp=afa_squeezenet_inpainting", "--set=data.views=6",
                      "--set=backbone.weights=random", "--set=train.steps=70,90")  # fmt: skip
    assert {run.exp for run in changed} == {
        "afa_squeezenet_inpainting", "baseline_squeezenet_inpainting"
    }  # fmt: skip
    assert {run.config.data.views for run in changed} == {6}
    steps = [run.config.train.steps for run in changed if run.config.seed == 0]
    assert {each: steps.count(each) for each in steps} == {
        "70": steps.count("90"), "140": 1, "90": steps.count("70"), "180": 1
    }  # fmt: skip
    assert not [run for run in changed if run.config.backbone.name != "squeezenet1_0"]
    usual = planned(*words)
    wider = {run.config.backbone.name for run in usual if run.exp == "baseline_resnet18"}
    assert wider == {"resnet18", "resnet34"}
    # A wider network would need published weights of its own.
    given = planned(*words, "--set=backbone.weights=file.pth")
    assert {run.config.backbone.name for run in given} == {"resnet18"}
    assert {run.config.backbone.frozen_stages for run in given} == {0, 5}


@pytest.mark.parametrize(
    ("duration", "doubled"), [("280", "560"), ("2.5ep", "5ep"), ("40%", "80%"), ("0", "0")]
)
def test_twice_a_duration(duration, doubled):
    assert twice(duration) == doubled


def test_a_suite_is_executed(tmp_path, capsys):
    words = ["--suite=smoke", "--scale=laptop", f"--out={tmp_path / 'smoke'}"]
    assert command.main(words) == 0
    out, err = capsys.readouterr()
    assert out == f"results   {tmp_path / 'smoke' / 'sweep.json'}: 2 of 2 runs\n"
    assert err.count("done") == 2
    assert len(json.loads((tmp_path / "smoke" / "sweep.json").read_text())["runs"]) == 2


def test_the_function_does_what_the_command_does(tmp_path):
    seen = []
    content = afa.sweep(
        "debug", {"optim.learning_rate": [1e-3, 3e-4]}, seeds=2, scale="laptop",
        out=tmp_path / "sweep", processes=2, show=lambda sweep, states: seen.append(dict(states)),
    )  # fmt: skip
    assert len(content["runs"]) == 4 and not content["failed"]
    assert set(seen[-1].values()) == {"done"}
    with pytest.raises(afa.UserError, match="contains another plan"):
        afa.sweep("debug", scale="laptop", out=tmp_path / "sweep")


def test_the_table_shows_steps_and_scores(tmp_path):
    runs = plan(["debug"], [{"optim.learning_rate": 1e-3}], [0], "laptop")
    sweep = start.located(runs, tmp_path / "sweep")
    home = sweep.workdir(runs[0]).root
    home.mkdir(parents=True)
    (home / "metrics.jsonl").write_text(
        '{"step": 2, "validation/map_at_r": 0.123}\n{"step": 3, "loss": 1.0}\n{"st'
    )
    console = Console(width=140, file=io.StringIO())
    with console.capture() as captured:
        console.print(progress.table(sweep, {runs[0].name: "running"}))
    text = captured.get()
    assert "1 runs: 1 running" in text
    assert f"{runs[0].name}" in text and "running   3      12.3" in text


def test_a_search_prints_the_best_settings(tmp_path, capsys):
    pytest.importorskip("optuna")
    words = [*DEBUG, "--trials=2", "--set=optim.learning_rate=1e-4:1e-2", f"--out={tmp_path / 's'}"]
    assert command.main([*words, "--dry_run"]) == 0
    assert capsys.readouterr().out == (
        "optim.learning_rate         Range(low=0.0001, high=0.01)\n2 trials of debug\n"
    )
    assert command.main(words) == 0
    out = capsys.readouterr().out
    best = json.loads((tmp_path / "s" / "search.json").read_text())["best"]
    assert f"--optim.learning_rate={best['settings']['optim.learning_rate']} " in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--exp or --suite is missing"),
        (["--exp=debugg"], "exp='debugg' is unknown; did you mean 'debug'?"),
        ([*DEBUG, "--set=optim.learning_rat=1"],
         "optim.learning_rat is not a field; did you mean 'optim.learning_rate'?"),
        ([*DEBUG, "--set=loss.name=arcfac"], "did you mean 'arcface'?"),
        ([*DEBUG, "--set=optim.learning_rate=much"], "optim.learning_rate='much'"),
        ([*DEBUG, "--set=optim.learning_rate=1,1"], "has a value twice"),
        ([*DEBUG, "--set=optim.learning_rate=1,"], "has an empty value"),
        ([*DEBUG, "--set=optim.learning_rate"], "is not FIELD=A,B"),
        ([*DEBUG, "--set=seed=1,2"], "--set seed: use --seeds=N"),
        ([*DEBUG, "--zip", "optim.learning_rate=1,2", "train.steps=1"],
         "--zip needs as many values for every field: optim.learning_rate 2, train.steps 1"),
        ([*DEBUG, "--random=3"], "--random=3: there are only 1 combinations"),
        ([*DEBUG, "--seeds=-1"], "--seeds=-1 must not be negative"),
        ([*DEBUG, "--executor=slrum"], "--executor='slrum' is unknown; did you mean 'slurm'?"),
        (["--exp=debug", "--executor=slurm"],
         "scale='auto': the devices of slurm are not known here (allowed: laptop, full)"),
        ([*DEBUG, "--options=x"], "--options is of the executors slurm and sky"),
        ([*DEBUG, "--executor=slurm", "--processes=2"], "--processes is of the executor local"),
        (["--suite=smok"], "--suite='smok' is unknown; did you mean 'smoke'?"),
        (["--suite=smoke", "--exp=debug"], "--suite=smoke has its own runs: remove --exp"),
        (["--suite=losses", "--random=3"], "--suite=losses has its own runs: remove --random"),
        (["--suite=losses", "--exp=debug"], "exp='debug' has no baseline"),
        (["--suite=losses", "--exp=afa_resnet81"], "did you mean 'afa_resnet18'?"),
        (["--suite=losses", "--set=data.pat=x"], "did you mean 'data.path'?"),
        (["--exp=afa_vgg16", "--tune"], "--tune: afa_vgg16 proposes no values"),
        ([*DEBUG, "--trials=3"], "--trials needs fields to change: --set or --tune"),
        ([*DEBUG, "--trials=3", "--set=optim.learning_rate=2:1"],
         "--set optim.learning_rate=2:1 is not a range LOW:HIGH of numbers"),
        ([*DEBUG, "--trials=3", "--seeds=2", "--tune"], "--trials searches one --exp"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([*words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "sweep"
    monkeypatch.setattr(sweeps, "write_json", full)
    assert command.main([*DEBUG, f"--out={out}"]) == 2
    assert capsys.readouterr().err.endswith(
        f"error: --out={out}: cannot be written (No space left on device); fix this and run the "
        "same command again to continue\n"
    )
    monkeypatch.undo()
    assert not (out / "plan.json").exists()


def test_the_sweep_leaves_the_devices_to_its_runs(tmp_path):
    """A plan at the scale of this machine does not initialise JAX in the process of the sweep."""
    program = (
        "from experiments import sweep; from jax._src import xla_bridge;"
        "assert sweep.main(['--exp=afa_resnet18', '--set=optim.learning_rate=1e-3', '--dry_run',"
        f"'--out={tmp_path / 'x'}']) == 0; assert not xla_bridge.backends_are_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "waiting" in done.stdout


@pytest.mark.parametrize(
    ("platform", "scale"), [("cpu", "laptop"), ("gpu", "full"), ("tpu", "full")]
)
def test_the_scale_of_this_machine(platform, scale, monkeypatch):
    monkeypatch.setattr(devices, "found", lambda: (platform, 1))
    assert devices.scale_of("auto", "local") == scale
    assert devices.scale_of("full", "slurm") == "full"


@pytest.mark.slow
def test_real_runs_killed_ten_times_end_as_undisturbed_ones(tmp_path, monkeypatch):
    """Two losses, two learning rates, three seeds at debug size."""
    monkeypatch.undo()
    monkeypatch.setenv(PROGRAM_CACHE, str(tmp_path / "programs"))  # the tests turn it off
    draw = random.Random(0)

    def words(name):
        return [sys.executable, "-m", "experiments.sweep", *DEBUG, "--tune", "--seeds=3",
                "--processes=2", f"--out={tmp_path / name / 'sweep'}"]  # fmt: skip

    assert subprocess.run(words("undisturbed"), cwd=ROOT).returncode == 0
    store, finished = tmp_path / "killed" / "store", {}
    for _ in range(10):
        process = subprocess.Popen(words("killed"), cwd=ROOT)
        time.sleep(draw.uniform(5, 60))
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished |= {path: path.stat().st_mtime_ns for path in store.glob("*/result.json")
                     if path not in finished}  # fmt: skip
    assert subprocess.run(words("killed"), cwd=ROOT).returncode == 0
    one, other = ((tmp_path / name / "sweep" / "sweep.json").read_bytes()
                  for name in ("undisturbed", "killed"))  # fmt: skip
    assert one == other
    assert len(json.loads(one)["runs"]) == 12
    # A finished run is not run again. One that is killed during its evaluation is evaluated again,
    # and counts both readings of the test classes.
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())
    reads = [json.loads(path.read_text())["run"] for path in store.glob("*/test_reads.json")]
    assert len(reads) == 12 and min(reads) >= 1 and sum(reads) <= 12 + 2 * 10
