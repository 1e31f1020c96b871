"""The benchmark of training: its measurements, its errors, and equal losses in PyTorch."""

import importlib.util
import json
import subprocess
import sys

import pytest

from afa.errors import UserError
from experiments.benchmarks import training


def test_contenders_alternate_and_only_steps_are_timed(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])

    def contender(name, seconds):
        def run(steps):
            order.append((name, steps))
            clock[0] += seconds * steps + (100 if steps == 1 else 0)

        return run

    contenders = {"a": contender("a", 0.5), "b": contender("b", 2.0)}
    found = training.measure(contenders, turns=2, steps=4)
    assert order == [("a", 1), ("a", 4), ("b", 1), ("b", 4)] * 2
    assert found == {"a": [0.5, 0.5], "b": [2.0, 2.0]}


def test_speed_is_relative_to_the_faster_layout():
    seconds = {
        "afa baseline": [1.0, 2.0],
        "afa G and D": [3.0, 6.0],
        "torch channels_last": [1.1, 1.8],
        "torch NCHW": [4.0, 4.0],
    }
    found = training.figures(seconds, batch_size=30)
    ours = found["afa baseline"]
    assert ours["images_per_second"] == pytest.approx(20)
    assert ours["speed_over_torch"] == pytest.approx((1.1 + 0.9) / 2)
    # Half-width for two values: t(1) = 12.706 times half their difference.
    assert ours["speed_over_torch_interval"] == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert ours["cost_over_baseline"] == 1 and ours["cost_over_baseline_interval"] == 0
    assert found["afa G and D"]["cost_over_baseline"] == pytest.approx(3)
    assert found["torch NCHW"]["speed_over_torch"] < 1


def test_different_losses_are_refused():
    training._agree({"afa baseline": 4.0, "torch NCHW": 4.003}, 1e-3)
    with pytest.raises(UserError) as caught:
        training._agree({"afa baseline": 4.0, "torch NCHW": 4.1}, 1e-3)
    assert str(caught.value) == (
        "the implementations disagree: first loss 4.000000, torch NCHW 4.100000"
    )
    with pytest.raises(UserError):
        training._agree({"afa baseline": 4.0, "torch NCHW": float("nan")}, 1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--turns=1"], "error: --turns=1 must be at least 2\n"),
        (["--steps=0"], "error: --steps=0 must be at least 1\n"),
        (["--threads=0"], "error: --threads=0 must be at least 1\n"),
        (["--steps=x"], "error: --steps='x' is not a whole number "
         "(python -m experiments.benchmarks.training --help lists the options)\n"),
    ],
)  # fmt: skip
def test_errors_are_one_line(words, message, capsys):
    assert training.main(words) == 2
    assert capsys.readouterr().err == message


def test_without_torch_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert training.main([]) == 2
    assert capsys.readouterr().err == ("error: torch is not installed; install the extra `bench`\n")


@pytest.mark.slow
def test_both_implementations_compute_equal_losses(tmp_path):
    """`build` compares the first losses; the result has all contenders."""
    pytest.importorskip("torch", reason="needs the extra `bench`")
    out = tmp_path / "speed.json"
    # In its own process, because the command restricts the process to some cores.
    words = ["--backbones", "resnet18", "--image_size=32", "--batch_size=8", "--turns=2",
             "--steps=1", "--threads=1", f"--out={out}"]  # fmt: skip
    command = [sys.executable, "-m", training.__name__, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["backbones"]["resnet18"]) == {
        "afa baseline", "afa + feature augmentation", "afa G and D", "torch channels_last",
        "torch NCHW",
    }  # fmt: skip
    assert "speed / torch" in done.stdout
