"""The plan of a run, and the actions of the loop between steps, without networks."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from afa import parallel
from afa.data.pipeline import TrainPipeline
from afa.errors import UserError
from afa.train import loop
from afa.train.checkpoint import Checkpoints
from afa.train.logging import MetricWriter
from afa.train.state import TrainState

EPOCH = 10


def planned(**fields):
    return loop.plan(tiny.config(**{"train.steps": "8", "train.generator_steps": "4", **fields}),
                     EPOCH)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.steps": "0"}, "train.steps='0' gives 0 steps (allowed: at least 1)"),
        (
            {"train.steps": "0.04ep"},
            "train.steps='0.04ep' gives 0 steps (allowed: at least 1)",
        ),
        (
            {"train.generator_steps": "1%"},
            "train.generator_steps='1%' gives 0 steps (allowed: at least 1)",
        ),
        (
            {"optim.accumulate": 9},
            "optim.accumulate=9 is more than the 8 steps of F: no parameter would be updated",
        ),
        (
            {"optim.accumulate": 5},
            "optim.accumulate=5 is more than the 4 steps of G and D: no parameter would be updated",
        ),
        (
            {"optim.warmup": "1ep"},
            "optim.warmup='1ep' is 10 steps, more than the 8 of F",
        ),
        (
            {"optim.head_warmup": "1ep"},
            "optim.head_warmup='1ep' is 10 steps, more than the 8 of F",
        ),
    ],
)
def test_durations_of_no_step_or_too_many_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        planned(**fields)
    assert str(caught.value) == message


def test_steps_of_g_are_ignored_without_g():
    without = {"adversarial.generator": False, "optim.accumulate": 5, "optim.warmup": "5"}
    assert planned(**without).total == 8


def test_zero_means_never_and_a_small_percentage_means_every_step():
    never = planned(**{f"train.{name}_every": "0" for name in ("log", "evaluate", "checkpoint")})
    assert (never.log_every, never.evaluate_every, never.checkpoint_every) == (0, 0, 0)
    often = planned(**{f"train.{name}_every": "1%" for name in ("log", "evaluate", "checkpoint")})
    assert (often.log_every, often.evaluate_every, often.checkpoint_every) == (1, 1, 1)


class Recorder(TrainPipeline, Checkpoints, MetricWriter):
    """Replaces pipeline, checkpoints and metric writer, and records calls of the loop."""

    def __init__(self):
        self.saved, self.logged = [], []

    def iterate(self, start, stop):  # pyright: ignore[reportIncompatibleMethodOverride]
        return iter([{}] * (stop - start))

    def latest(self):
        return None

    def save(self, state, position, config, metrics):
        self.saved.append((position.batch, len(position.pending), metrics))

    def finish(self):
        pass

    flush = finish

    def log(self, step, stage, metrics):
        self.logged.append((step, "validation/map_at_r" in metrics))


def walked(monkeypatch, **fields):
    """Runs the loop with dummy steps: 8 of F, the last 5 of them with perturbed features."""

    def step(state, batch):
        return state.replace(step=state.step + 1), {"metric_loss": jnp.ones(())}

    plan = planned(**{"adversarial.generator": False, "train.plain": "3"} | fields)
    ends = [("F", 0, plan.plain), ("F + perturbation", plan.plain, plan.embedder_steps)]
    monkeypatch.setattr(loop, "stages", lambda *_: [loop.Stage(*each, step, 8) for each in ends])
    recorder, measured = Recorder(), []

    def evaluate(state):
        measured.append(int(state.step))
        return {"map_at_r": 0.5}

    state = parallel.replicate(TrainState(np.zeros((), np.int32), {}, {}, {}, {}))
    context = tiny.context(tiny.config())
    after, _ = loop.train(
        context, plan, state, loop.Position(0, 0.0), recorder, recorder, recorder, evaluate
    )  # fmt: skip
    assert int(after.step) == 8
    return recorder, measured


def test_logs_evaluations_and_checkpoints_when_due_and_at_the_end_of_a_stage(monkeypatch):
    every = {"train.log_every": "2", "train.evaluate_every": "4", "train.checkpoint_every": "2"}
    recorder, measured = walked(monkeypatch, **every)
    assert measured == [3, 4, 8]
    assert [step for step, figures in recorder.logged if not figures] == [2, 3, 4, 6, 8]
    assert [step for step, _, _ in recorder.saved] == [2, 3, 4, 6, 8]


def test_without_logs_and_evaluations(monkeypatch):
    """Checkpoints only at the end of a stage; pending metrics do not accumulate."""
    every = {"train.log_every": "0", "train.evaluate_every": "0", "train.checkpoint_every": "0"}
    recorder, measured = walked(monkeypatch, **every)
    assert measured == []
    assert recorder.logged == []
    assert [(step, metrics) for step, _, metrics in recorder.saved] == [(3, None), (8, None)]
    assert all(pending <= 1 for _, pending, _ in recorder.saved)
