"""Starts a sweep: `afa.sweep`, and what the command `python -m experiments.sweep` uses too."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.io import write_json
from afa.sweeps.devices import scale_of
from afa.sweeps.executors import create
from afa.sweeps.executors.contract import Executor
from afa.sweeps.plan import Planned, combinations, plan
from afa.sweeps.sweep import Sweep, execute, full_disk, summarise

Show = Callable[[Sweep, Mapping[str, str]], None]


def sweep(
    exp: str | Sequence[str],
    values: Mapping[str, Sequence[Any]] | None = None,
    *,
    zipped: Sequence[Mapping[str, Sequence[Any]]] = (),
    seeds: int = 1,
    scale: str = "auto",
    out: str | Path = "runs/sweep",
    store: str | Path = "",
    executor: str = "local",
    processes: int = 0,
    options: Sequence[str] = (),
    show: Show | None = None,
) -> dict[str, Any]:
    """Executes every experiment with every combination of values and every seed.

        afa.sweep("debug", {"loss.name": ["norm_softmax", "arcface"]}, seeds=3, out="runs/losses")

    A run that is done is not repeated; called again after an interruption, it continues.

    Args:
      exp: one experiment or several.
      values: field -> its values, all combined.
      zipped: groups of fields whose values change together.
      seeds: number of seeds: 0, 1, ...
      scale: of the experiments: "laptop", "full", or "auto" for the devices of this machine.
      out: directory of the sweep.
      store: directory of run directories, shared by sweeps; `store` beside `out` if empty.
      executor: a name of `afa.sweeps.executors.EXECUTORS`.
      processes: local: runs at a time; 0: one per accelerator, or one.
      options: further words for the command that submits a job (slurm, sky).
      show: called with the sweep and the state of every run after every change.

    Returns:
      The content of sweep.json: "runs" with their settings and test metrics, and "failed".

    Raises:
      UserError: a mistake in the arguments, another plan in `out`, or a cluster that fails.
    """
    exps = [exp] if isinstance(exp, str) else list(exp)
    scale = scale_of(scale, executor)
    runs = plan(exps, combinations(values or {}, zipped), range(seeds), scale)
    planned = located(runs, out, store)
    return perform(planned, create(executor, planned.out, processes, options), show)


def perform(planned: Sweep, executor: Executor, show: Show | None = None) -> dict[str, Any]:
    """Executes a planned sweep and writes sweep.json; returns its content."""
    with full_disk(planned.out):
        execute(planned, executor, lambda states: show(planned, states) if show else None)
        content = summarise(planned)
        write_json(planned.summary, content)
    return content


def located(runs: Sequence[Planned], out: str | Path, store: str | Path = "") -> Sweep:
    """Returns a sweep with its directories.

    Raises:
      UserError: no runs.
    """
    if not runs:
        raise UserError("the plan has no runs")
    return Sweep(runs, Path(out), Path(store) if str(store) else Path(out).parent / "store")
