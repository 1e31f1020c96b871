"""Searches with Optuna: scores on validation classes, pruning, continuation."""

import json

import pytest
from paths import ROOT
from sweep_worker import COMMAND as WORKER

from afa.errors import UserError
from afa.sweeps import search as module
from afa.sweeps.executors.local import Local
from afa.sweeps.search import Range, Search

pytest.importorskip("optuna")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def searched(root, trials=6, **space):
    space = space or {"optim.learning_rate": Range(1e-4, 1e-2)}
    return Search("debug", "laptop", space, trials, root / "search", root / "store")


def score(rate):
    """Of the worker, for a learning rate."""
    import math

    return 0.9 - 0.2 * abs(math.log10(rate) + 3)


def test_the_best_trial_has_the_best_score_on_validation_classes(tmp_path):
    search = searched(tmp_path)
    content = search.execute(Local(2, WORKER), lambda *_: None)
    done = [row for row in content["trials"] if row["state"] == "complete"]
    assert len(content["trials"]) == 6 and len(done) >= module.STARTUP
    rates = [row["settings"]["optim.learning_rate"] for row in done]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert [row["validation_map_at_r"] for row in done] == pytest.approx(list(map(score, rates)))
    assert content["best"]["validation_map_at_r"] == max(map(score, rates))
    assert json.loads((search.out / "search.json").read_text()) == content


def test_a_search_is_continued(tmp_path):
    first = searched(tmp_path, 2).execute(Local(2, WORKER), lambda *_: None)
    content = searched(tmp_path, 3).execute(Local(2, WORKER), lambda *_: None)
    assert content["trials"][:2] == first["trials"] and len(content["trials"]) == 3
    started = [path.read_text().split() for path in tmp_path.glob("store/*/started")]
    assert [len(each) for each in started] == [1] * 3


def test_a_search_that_was_stopped_finishes_its_trials(tmp_path):
    class Stopped(Exception):
        pass

    def stop(sweep, states):
        if "running" in states.values():
            raise Stopped

    search = searched(tmp_path, 2)
    with pytest.raises(Stopped):
        search.execute(Local(1, WORKER), stop)
    content = search.execute(Local(1, WORKER), lambda *_: None)
    assert [row["state"] for row in content["trials"]] == ["complete", "complete"]


def test_a_bad_run_is_stopped_early(tmp_path, monkeypatch):
    import optuna

    monkeypatch.setattr(module, "PAUSE", 0.05)
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda self: self.number == 1)
    cancelled = []

    class Noted(Local):
        def cancel(self, name):
            cancelled.append(name)
            super().cancel(name)

    content = searched(tmp_path, 2).execute(Noted(1, WORKER), lambda *_: None)
    assert [row["state"] for row in content["trials"]] == ["complete", "pruned"]
    assert len(cancelled) == 1


def test_a_failed_trial_has_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "plan", lambda exps, changes, seeds, scale: _plan(exps, changes))
    content = searched(tmp_path, 1).execute(Local(1, WORKER), lambda *_: None)
    (row,) = content["trials"]
    assert row["state"] == "fail" and content["best"] is None
    assert row["failure"] == "error: seed 13 is unlucky (exit code 2)"


def _plan(exps, changes):
    from afa.sweeps.plan import plan

    return plan(exps, changes, [13], "laptop")


def test_the_directory_of_another_search_is_refused(tmp_path):
    searched(tmp_path, 1).execute(Local(1, WORKER), lambda *_: None)
    other = searched(tmp_path, 1, **{"optim.learning_rate": [1e-3, 3e-4]})
    with pytest.raises(UserError, match="contains another search"):
        other.execute(Local(1, WORKER), lambda *_: None)


def test_values_are_drawn_from_a_list(tmp_path):
    space = {"optim.learning_rate": [1e-3], "loss.name": ["arcface"]}
    content = searched(tmp_path, 1, **space).execute(Local(1, WORKER), lambda *_: None)
    assert content["best"]["settings"] == {"optim.learning_rate": "0.001", "loss.name": "arcface"}
