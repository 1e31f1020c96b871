"""Executes many runs: `python -m experiments.sweep`.

    python -m experiments.sweep --exp=afa_resnet18,baseline_resnet18 \\
        --set optim.learning_rate=1e-3,3e-4 --seeds=5

runs every experiment with every combination of values and every seed. Runs of the same seed share
their batches, so that differences are paired. A run is named by a hash of its settings; a run that
another sweep has done is not repeated. Stopped at any time, even killed, the same command
continues. Failed runs are retried once and listed in OUT/failures.json. Results: OUT/sweep.json.

Elements of a setting with several values are joined by +: --set evaluation.views=flip,flip+median.

With --trials=N, Optuna chooses N combinations by their MAP@R on validation classes (seed 0), and
stops bad runs early; a range is LOW:HIGH, such as --set optim.learning_rate=1e-4:1e-2. Results:
OUT/search.json.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import EXIT_DIVERGED, UserError, choose
from experiments.cli import Parser, note, perform

if TYPE_CHECKING:
    from afa.sweeps.executors.contract import Executor
    from afa.sweeps.plan import Planned
    from afa.sweeps.search import Range, Search
    from afa.sweeps.start import Show
    from afa.sweeps.sweep import Sweep

PROGRAM = "python -m experiments.sweep"
CHOICES = ("set", "zip", "random", "trials", "tune")


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser.of(PROGRAM, __doc__)
    add = options.add_argument
    add("--exp", default="", metavar="A,B", help="experiments")
    add("--set", action="append", default=[], metavar="FIELD=A,B",
        help="a field and its values, combined with all others; may be repeated")  # fmt: skip
    add("--zip", action="append", nargs="+", default=[], metavar="FIELD=A,B",
        help="fields whose values change together; may be repeated")  # fmt: skip
    add("--tune", action="store_true",
        help="the fields and values that the experiment's file proposes (`sweep()`)")  # fmt: skip
    add("--suite", default="", metavar="NAME",
        help="a set of runs of experiments/suites.py, list prints all; with --exp=afa_X about this "
        "method, with --set for other data or settings")  # fmt: skip
    add("--seeds", type=int, default=0, metavar="N",
        help="number of seeds: 0, 1, ... (default: 1, or that of the suite)")  # fmt: skip
    add("--random", type=int, default=0, metavar="N",
        help="only N combinations, drawn at random, always the same ones")  # fmt: skip
    add("--trials", type=int, default=0, metavar="N", help="search with Optuna, N combinations")
    add("--scale", choices=("auto", "laptop", "full"), default="auto",
        help="scale of the experiments (default: auto)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/sweep"), metavar="DIR",
        help="directory of the sweep (default: runs/sweep)")  # fmt: skip
    add("--store", type=Path, default=None, metavar="DIR",
        help="directory of run directories, shared by sweeps (default: OUT/../store)")  # fmt: skip
    add("--executor", default="local", help="local, slurm or sky (default: local)")
    add("--processes", type=int, default=0, metavar="N",
        help="local: runs at a time (default: one per accelerator, or one)")  # fmt: skip
    add("--options", default="", metavar="WORDS",
        help='slurm, sky: further words for the command that submits a job, such as '
        '--options="--gres=gpu:1 --time=4:00:00"')  # fmt: skip
    add("--dry_run", action="store_true", help="list the runs and exit")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    from afa.sweeps.devices import scale_of
    from afa.sweeps.executors import EXECUTORS
    from experiments.suites import SUITES

    for name in ("seeds", "random", "trials", "processes"):
        if getattr(chosen, name) < 0:
            raise UserError(f"--{name}={getattr(chosen, name)} must not be negative")
    if chosen.suite == "list":
        for name, suite in SUITES.items():
            print(f"{name:<12}{suite.purpose}")
        return 0
    choose("--executor", chosen.executor, EXECUTORS)
    if chosen.executor == "local" and chosen.options:
        raise UserError("--options is of the executors slurm and sky")
    if chosen.executor != "local" and chosen.processes:
        raise UserError("--processes is of the executor local")
    chosen.scale = scale_of(chosen.scale, chosen.executor)
    return _search(chosen) if chosen.trials else _sweep(chosen)


def _executor(chosen: argparse.Namespace) -> "Executor":
    from afa.sweeps.executors import create

    return create(chosen.executor, chosen.out, chosen.processes, shlex.split(chosen.options))


def _sweep(chosen: argparse.Namespace) -> int:
    from afa.sweeps import start

    runs = planned(chosen)
    sweep = start.located(runs, chosen.out, chosen.store or "")
    if chosen.dry_run:
        _list(sweep)
        return 0
    executor = _executor(chosen)
    with _shown() as show:
        content = start.perform(sweep, executor, show)
    for name, reasons in content["failed"].items():
        note(f"failed    {name}: {reasons[-1]}")
    print(f"results   {sweep.summary}: {len(content['runs'])} of {len(runs)} runs")
    return EXIT_DIVERGED if content["failed"] else 0


def planned(chosen: argparse.Namespace) -> "list[Planned]":
    """Returns the runs of a command line.

    Raises:
      UserError: an unknown experiment, field or value, or values that do not fit together.
    """
    from afa.sweeps.plan import combinations, plan

    if chosen.suite:
        return _suite(chosen)
    exps = _experiments(chosen)
    texts = combinations(
        _values("--set", chosen.set), [_values("--zip", each) for each in chosen.zip], chosen.random
    )
    changes = [_typed(exps[0], chosen.scale, each) for each in texts]
    seeds = range(chosen.seeds or 1)
    if not chosen.tune:
        return plan(exps, changes, seeds, chosen.scale)
    if chosen.set or chosen.zip or chosen.random:
        raise UserError("--tune has its own values: remove --set, --zip and --random")
    proposed = {exp: combinations(_proposed(exp), []) for exp in exps}
    return [run for exp in exps for run in plan([exp], proposed[exp], seeds, chosen.scale)]


def _suite(chosen: argparse.Namespace) -> "list[Planned]":
    from afa.config import with_changes
    from afa.runs.start import configured
    from afa.sweeps.plan import combinations, plan
    from experiments import configs
    from experiments.suites import METHOD, SUITES, Subject

    suite = choose("--suite", chosen.suite, SUITES)
    own = [name for name in CHOICES if name != "set"] + ["exp"] * (not suite.any_method)
    if given := [name for name in own if getattr(chosen, name)]:
        raise UserError(f"--suite={chosen.suite} has its own runs: remove --{given[0]}")
    method = chosen.exp or METHOD
    baseline = configs.baseline(method)
    seeds = range(chosen.seeds or suite.seeds)
    found: dict[str, Planned] = {}
    for texts in combinations(_values("--set", chosen.set), []):
        # Any experiment knows the types of the fields; debug does not refuse settings of a suite.
        changes = _typed(method if suite.any_method else "debug", chosen.scale, texts)
        config = with_changes(configured(baseline, chosen.scale, changes), **changes)
        for part in suite.parts(Subject(method, baseline, config)):
            rows = [{**changes, **values} for values in combinations(part.values, [])]
            runs = plan(part.exps, rows, seeds, chosen.scale)
            found |= {run.digest: run for run in runs if run.digest not in found}
    return list(found.values())


def _experiments(chosen: argparse.Namespace) -> list[str]:
    from experiments import configs

    if not chosen.exp:
        raise UserError("--exp or --suite is missing")
    exps = _split("--exp", chosen.exp)
    for exp in exps:
        configs.find(exp)
    return exps


def _proposed(exp: str) -> Mapping[str, Sequence[Any]]:
    from experiments import configs

    values = configs.proposed(exp)
    if values is None:
        raise UserError(f"--tune: {exp} proposes no values (its file has no `sweep()`)")
    return values


def _values(option: str, words: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not name:
            raise UserError(f"{option} {word!r} is not FIELD=A,B")
        if name in found:
            raise UserError(f"{option} {name} is given twice")
        if name == "seed":
            raise UserError(f"{option} seed: use --seeds=N")
        found[name] = _split(f"{option} {name}", values)
    return found


def _split(option: str, text: str) -> list[str]:
    values = [each.strip() for each in text.split(",")]
    if not all(values):
        raise UserError(f"{option}={text!r} has an empty value")
    if len(set(values)) < len(values):
        raise UserError(f"{option}={text!r} has a value twice")
    return values


def _typed(exp: str, scale: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Converts the values of one combination as the command `experiments.run` does."""
    from afa import config as configuration
    from experiments import run

    words = [f"--exp={exp}", f"--scale={scale}"]
    for name, text in texts.items():
        words += [f"--{name}", *text.split("+")] if "+" in text else [f"--{name}={text}"]
    settings = configuration.flatten(run.parse(words))
    return {name: settings[name] for name in texts}


# ---- search ------------------------------------------------------------------------------------


def _search(chosen: argparse.Namespace) -> int:
    search = searched(chosen)
    if chosen.dry_run:
        for name, space in search.space.items():
            print(f"{name:<28}{space}")
        print(f"{search.trials} trials of {search.exp}")
        return 0
    executor = _executor(chosen)
    with _shown() as show:
        content = search.execute(executor, show)
    best = content["best"]
    if best is None:
        note("failed    no trial was finished; their reasons are in search.json")
        return EXIT_DIVERGED
    settings = " ".join(f"--{name}={value}" for name, value in best["settings"].items())
    print(f"best      {settings} (MAP@R on validation classes "
          f"{100 * best['validation_map_at_r']:.1f} %)")  # fmt: skip
    print(f"results   {search.out / 'search.json'}")
    return 0


def searched(chosen: argparse.Namespace) -> "Search":
    """Returns the search of a command line.

    Raises:
      UserError: options that it does not have, or a bad range or value.
    """
    from afa.sweeps.search import Search

    exps = _experiments(chosen)
    if len(exps) > 1 or chosen.zip or chosen.random or chosen.seeds or chosen.suite:
        raise UserError("--trials searches one --exp with --set or --tune, at seed 0")
    if chosen.tune:
        space: dict[str, Range | Sequence[Any]] = dict(_proposed(exps[0]))
    else:
        values = _values("--set", chosen.set)
        space = {name: _space(exps[0], chosen.scale, name, each) for name, each in values.items()}
    if not space:
        raise UserError("--trials needs fields to change: --set or --tune")
    store = chosen.store or chosen.out.parent / "store"
    return Search(exps[0], chosen.scale, space, chosen.trials, chosen.out, store)


def _space(exp: str, scale: str, name: str, texts: Sequence[str]) -> "Range | list[Any]":
    from afa.sweeps.search import Range

    low, colon, high = texts[0].partition(":")
    ends = (low, high) if colon else texts
    values = [_typed(exp, scale, {name: text})[name] for text in ends]
    if not colon:
        return values
    numbers = all(isinstance(value, int | float) for value in values)
    if len(texts) > 1 or not numbers or not values[0] < values[1]:
        raise UserError(f"--set {name}={','.join(texts)} is not a range LOW:HIGH of numbers")
    return Range(*values)


# ---- output ------------------------------------------------------------------------------------


def _list(sweep: "Sweep") -> None:
    """Prints the runs, and what the ones that are not done will take."""
    from afa.console import duration
    from afa.sweeps import estimate

    done = {run.name for run in sweep.done()}
    costs = estimate.measured(sorted(sweep.store.glob("*/")))
    seconds, size, unknown = 0.0, 0, 0
    for run in sweep.runs:
        changes = " ".join(f"{name}={value}" for name, value in run.changes.items())
        cost = estimate.of(run.config, costs)
        about = "" if cost is None else f"  about {duration(cost.seconds)}"
        print(f"{'done' if run.name in done else 'waiting':<8} {run.name}  {changes}{about}")
        if run.name not in done:
            unknown += cost is None
            seconds += 0.0 if cost is None else cost.seconds
            size += 0 if cost is None else cost.bytes
    print(f"{len(sweep.runs)} runs, {len(done)} done")
    if known := len(sweep.runs) - len(done) - unknown:
        print(f"{known} of the others take about {duration(seconds)} one after the other, and "
              f"{size / 2**20:,.0f} MiB (measured on finished runs in {sweep.store})")  # fmt: skip
    if unknown:
        print(f"{unknown} of the others: no estimate, because no run of their kind is finished in "
              f"{sweep.store}")  # fmt: skip


@contextmanager
def _shown() -> "Iterator[Show]":
    """Yields a function that shows the runs: a live table on a terminal, else a line per change."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.live import Live

    from afa.sweeps import progress

    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        yield lambda sweep, states: live.update(progress.table(sweep, states), refresh=True)


def _lines() -> "Callable[[Sweep, Mapping[str, str]], None]":
    last: dict[str, str] = {}

    def show(sweep: "Sweep", states: Mapping[str, str]) -> None:
        finished = sum(each in ("done", "failed") for each in states.values())
        for name, state in states.items():
            if last.get(name, "waiting") != state:
                note(f"{finished}/{len(states)}  {state:<8} {name}")
        last.update(states)

    return show


if __name__ == "__main__":
    sys.exit(main())
