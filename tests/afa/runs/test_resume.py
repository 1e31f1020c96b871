"""A run ended in its middle and started again comes to the same bits as an unbroken one."""

import random
import signal

import pytest
import tiny_run

from afa import parallel
from afa.errors import EXIT_PREEMPTED
from afa.runs import run as job
from experiments.cli import guarded


class TrainingEnded(Exception):
    """Raised in place of the evaluation, which tests of training need not wait for."""


def without_evaluation(monkeypatch):
    def end(*args):
        raise TrainingEnded

    monkeypatch.setattr(job, "evaluate", end)


PUBLIC = ("checkpoints", "config.json", "metrics.jsonl", "split.json", "tensorboard")


def same(run, reference):
    """Compares everything that a run computes, bit for bit."""
    assert tiny_run.digest(run) == tiny_run.digest(reference)
    assert tiny_run.lines(run) == tiny_run.lines(reference)
    assert tiny_run.figures(run) == tiny_run.figures(reference)
    mine, theirs = tiny_run.result(run), tiny_run.result(reference)
    assert mine["data"] == theirs["data"] and mine["step"] == theirs["step"]
    kept = [sorted(p.name for p in (each / "checkpoints").iterdir()) for each in (run, reference)]
    assert kept[0] == kept[1]


def ended(words, where, code):
    """Runs the command until it sends itself a signal; returns what it said."""
    found, out, err = tiny_run.finish(tiny_run.start(*words, END=where))
    assert found == code, err
    return out, err


def test_a_signal_and_two_kills_change_nothing(tiny_data, tiny_finished, tmp_path):
    """SIGTERM between two log lines, SIGKILL while a checkpoint is written, SIGKILL at the end of
    a stage whose evaluation is not saved yet; then to the end."""
    home = tmp_path / "run"
    words = tiny_run.words(tiny_data, home)
    out, err = ended(words, "step:4:SIGTERM", EXIT_PREEMPTED)
    assert err == (
        "stopped by a signal after step 5; everything is saved; the same command continues "
        "(exit code 75)\n"
    )
    assert sorted(p.name for p in home.iterdir() if p.name != ".lock") == list(PUBLIC)
    assert (home / "checkpoints" / "5").is_dir()
    before = tiny_run.digest(home, 5)
    out, _ = ended(words, "save:6:SIGKILL", -signal.SIGKILL)
    assert "resuming after step 5 of 12" in out
    assert tiny_run.digest(home, 5) == before
    ended(words, "step:8:SIGKILL", -signal.SIGKILL)
    code, out, err = tiny_run.finish(tiny_run.start(*words))
    assert code == 0, err
    assert "resuming after step " in out
    same(home, tiny_finished)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_ten_signals_at_random_steps(name, tiny_data, tiny_finished, tmp_path):
    """Every run is ended once, at a step and place of its own, and ends as the others do."""
    draw = random.Random(20261124)
    code = EXIT_PREEMPTED if name == "SIGTERM" else -signal.SIGKILL
    for number in range(10):
        step, place = draw.randint(1, tiny_run.STEPS - 1), draw.choice(("step", "save"))
        if place == "save":  # where one is written
            step += step % 2
        home = tmp_path / str(number)
        words = tiny_run.words(tiny_data, home)
        ended(words, f"{place}:{step}:{name}", code)
        assert tiny_run.finish(tiny_run.start(*words))[0] == 0
        same(home, tiny_finished)


def test_a_signal_in_the_final_evaluation_loses_nothing(tiny_data, tiny_copy):
    """Outside of training there is nothing to save, and the exit code is the same."""
    process = tiny_run.start(*tiny_run.words(tiny_data, tiny_copy))
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if "is finished (12 steps)" in line:
            process.send_signal(signal.SIGTERM)
            break
    code, _, err = tiny_run.finish(process)
    assert code == EXIT_PREEMPTED
    assert err == (
        "stopped by a signal; the same command continues from the last checkpoint (exit code 75)\n"
    )
    assert tiny_run.digest(tiny_copy)


def test_a_command_without_checkpoints_does_not_speak_of_them(capsys):
    def stopped():
        raise KeyboardInterrupt

    assert guarded(stopped) == EXIT_PREEMPTED
    assert capsys.readouterr().err == (
        "stopped by a signal; the same command starts again (exit code 75)\n"
    )


class Stop:
    """Ends a run after a step, as a signal would, in this process."""

    def __init__(self, monkeypatch):
        self.at = 0
        monkeypatch.setattr(parallel, "preempted", lambda step, signalled: step == self.at)


@pytest.mark.parametrize("stops", [(3, 8), (5, 11)])
def test_parts_of_a_run_add_up_to_the_whole(stops, tiny_data, tiny_finished, tmp_path, monkeypatch):
    """At the ends of stages, where evaluations and log lines are due, and where they are not."""
    stop, home = Stop(monkeypatch), tmp_path / "run"
    words = tiny_run.words(tiny_data, home)
    without_evaluation(monkeypatch)
    for at in stops:
        stop.at = at
        assert tiny_run.main(*words) == EXIT_PREEMPTED
        assert tiny_run.digest(home, at)
    stop.at = 0
    with pytest.raises(TrainingEnded):
        tiny_run.main(*words)
    assert tiny_run.digest(home) == tiny_run.digest(tiny_finished)
    assert tiny_run.lines(home) == tiny_run.lines(tiny_finished)


def test_events_of_all_parts_are_kept(tiny_data, tmp_path, monkeypatch):
    """Each start writes a file of its own; TensorBoard shows them as one run."""
    stop, home = Stop(monkeypatch), tmp_path / "run"
    without_evaluation(monkeypatch)
    words = tiny_run.words(tiny_data, home, **{"train.steps": "4"})
    stop.at = 2
    assert tiny_run.main(*words) == EXIT_PREEMPTED
    stop.at = 0
    with pytest.raises(TrainingEnded):
        tiny_run.main(*words)
    files = list((home / "tensorboard").iterdir())
    assert len(files) == 2
    assert sorted(path.name.split(".")[-2] for path in files) == ["0", "2"]
