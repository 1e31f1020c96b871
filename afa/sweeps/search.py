"""Searches for good settings with Optuna, on validation classes only.

A trial is a run with seed 0. Its score is the last MAP@R on validation classes that it logs; its
results on test classes are not read. A run whose score is below the median of the others at the
same step is stopped (`MedianPruner`). The study is a journal in the directory of the search: after
an interruption, even a kill, the same command continues it.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import EXIT_PREEMPTED, UserError
from afa.io import locked, write_json
from afa.sweeps.executors.contract import Executor
from afa.sweeps.plan import Planned, plan
from afa.sweeps.progress import validation
from afa.sweeps.sweep import ATTEMPTS, PAUSE, Sweep, full_disk, reason_of, task_of

if TYPE_CHECKING:
    import optuna

STARTUP = 4  # trials before runs are stopped early
LOG_SCALE = 10  # a range of positive values whose ends differ by this factor is searched in logs


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, both included."""

    low: float | int
    high: float | int


Space = Mapping[str, Range | Sequence[Any]]  # field -> range, or its possible values


@dataclass
class _Live:
    """A trial whose run is not finished."""

    trial: "optuna.Trial"
    run: Planned
    running: bool = False
    pruned: bool = False
    failures: int = 0


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
      exp, scale: recipe and its scale.
      space: fields and what they may be.
      trials: number of trials.
      out: directory of the search: the study, search.json, logs.
      store: directory of run directories, shared with sweeps.
    """

    exp: str
    scale: str
    space: Space
    trials: int
    out: Path
    store: Path

    def execute(
        self, executor: Executor, show: Callable[[Sweep, Mapping[str, str]], None]
    ) -> dict[str, Any]:
        """Runs all trials; returns the content of search.json: "best" and "trials".

        Args:
          show: called with the runs so far and the state of each after every change.

        Raises:
          UserError: Optuna is not installed, another process has the search, or its directory
            holds another one.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.store.mkdir(parents=True, exist_ok=True)
        busy = f"--out={self.out}: another process executes this search"
        with full_disk(self.out), locked(self.out / ".lock", busy=busy):
            study = self._study()
            try:
                self._loop(study, executor, show)
            except BaseException:
                executor.stop()
                raise
            content = summary(study)
            write_json(self.out / "search.json", content)
        return content

    def _study(self) -> "optuna.Study":
        optuna = _optuna()
        described = {"exp": self.exp, "scale": self.scale, "space": str(dict(self.space))}
        journal = optuna.storages.journal.JournalFileBackend(str(self.out / "study.log"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=optuna.storages.JournalStorage(journal),
                study_name=self.exp, direction="maximize", load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
            )  # fmt: skip
        # A continued study draws other values than at its start.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
        stored = study.user_attrs
        if not stored:
            for name, value in described.items():
                study.set_user_attr(name, value)
        elif stored != described:
            raise UserError(f"--out={self.out} contains another search (choose another --out)")
        return study

    def _loop(
        self,
        study: "optuna.Study",
        executor: Executor,
        show: Callable[[Sweep, Mapping[str, str]], None],
    ) -> None:
        optuna = _optuna()
        waiting = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        live = [self._live(study, optuna.Trial(study, trial._trial_id)) for trial in waiting]
        while True:
            for name, code in executor.ended().items():
                for each in live:
                    if each.run.name == name:
                        self._end(each, code)
            for each in [*live]:
                if self._settle(study, each, executor):
                    live.remove(each)
            while executor.free() > _unstarted(live) and len(study.trials) < self.trials:
                live.append(self._live(study, study.ask()))
            self._start(live, executor)
            show(self._sweep(live), {each.run.name: _state(each) for each in live})
            if not live and len(study.trials) >= self.trials:
                return
            time.sleep(PAUSE)

    def _live(self, study: "optuna.Study", trial: "optuna.Trial") -> _Live:
        changes = {name: _drawn(trial, name, space) for name, space in self.space.items()}
        return _Live(trial, plan([self.exp], [changes], [0], self.scale)[0])

    def _sweep(self, live: Sequence[_Live]) -> Sweep:
        return Sweep([each.run for each in live], self.out, self.store)

    def _start(self, live: Sequence[_Live], executor: Executor) -> None:
        sweep = self._sweep(live)
        taken = {each.run.name for each in live if each.running}
        for each in live:
            name = each.run.name
            if each.running or name in taken or self._done(each) or sweep.busy(each.run):
                continue
            if executor.free() < 1:
                return
            executor.start([task_of(sweep, each.run)])
            each.running = True
            taken.add(name)

    def _end(self, live: _Live, code: int | None) -> None:
        """Notes that a run has ended; a failed one is retried once."""
        live.running = False
        if not (live.pruned or self._done(live) or code == EXIT_PREEMPTED):
            live.failures += 1
            live.trial.set_user_attr("failure", reason_of(self.out, live.run.name, code))

    def _settle(self, study: "optuna.Study", live: _Live, executor: Executor) -> bool:
        """Reports new scores of a run; whether its trial has come to an end."""
        state = _optuna().trial.TrialState
        values = validation(self._sweep([live]).workdir(live.run).root)
        reported = study.trials[live.trial.number].intermediate_values
        for step in values.keys() - reported.keys():
            if not live.pruned:
                live.trial.report(values[step], step)
        if live.running:
            if not live.pruned and live.trial.should_prune():
                executor.cancel(live.run.name)
                study.tell(live.trial, state=state.PRUNED)
                live.pruned = True
            return False
        if live.pruned:
            return True
        if self._done(live):
            study.tell(live.trial, values[max(values)])
        elif live.failures >= ATTEMPTS:
            study.tell(live.trial, state=state.FAIL)
        return self._done(live) or live.failures >= ATTEMPTS

    def _done(self, live: _Live) -> bool:
        return self._sweep([live]).workdir(live.run).result.is_file()


def _state(live: _Live) -> str:
    return "running" if live.running else "waiting"


def _unstarted(live: Sequence[_Live]) -> int:
    return sum(not each.running for each in live)


def _drawn(trial: "optuna.Trial", name: str, space: Range | Sequence[Any]) -> Any:
    """The value of a field in a trial."""
    if not isinstance(space, Range):
        listed = {str(each): each for each in space}  # a journal holds only simple values
        return listed[str(trial.suggest_categorical(name, list(listed)))]
    if isinstance(space.low, int) and isinstance(space.high, int):
        return trial.suggest_int(name, space.low, space.high)
    log = space.low > 0 and space.high >= LOG_SCALE * space.low
    return trial.suggest_float(name, space.low, space.high, log=log)


def summary(study: "optuna.Study") -> dict[str, Any]:
    """Content of search.json: every trial with its settings, score on validation classes and state,
    and the best one; None without a finished trial."""
    rows = [
        {"number": each.number, "settings": each.params, "state": each.state.name.lower(),
         "validation_map_at_r": each.value, **each.user_attrs}
        for each in study.trials
    ]  # fmt: skip
    done = [row for row in rows if row["state"] == "complete"]
    best = max(done, key=lambda row: row["validation_map_at_r"]) if done else None
    return {"best": best, "trials": rows}


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("--trials needs Optuna: install the extra `search`") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
