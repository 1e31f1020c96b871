"""Executes many runs: `python -m experiments.sweep`.

    python -m experiments.sweep --exp=afa_resnet18,baseline_resnet18 \\
        --set optim.learning_rate=1e-3,3e-4 --seeds=5

runs every experiment with every combination of values and every seed. Runs of the same seed share
their batches, so that differences are paired. A run is named by a hash of its settings; a run that
another sweep has done is not repeated. Stopped at any time, even killed, the same command
continues. Failed runs are retried once and listed in OUT/failures.json. Results: OUT/sweep.json.

Elements of a setting with several values are joined by +: --set evaluation.views=flip,flip+median.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import EXIT_DIVERGED, UserError
from experiments.cli import Parser, note, perform

if TYPE_CHECKING:
    from afa.sweeps.plan import Planned
    from afa.sweeps.sweep import Sweep

PROGRAM = "python -m experiments.sweep"


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(
        prog=PROGRAM,
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--exp", required=True, metavar="A,B", help="experiments")
    add("--set", action="append", default=[], metavar="FIELD=A,B",
        help="a field and its values, combined with all others; may be repeated")  # fmt: skip
    add("--zip", action="append", nargs="+", default=[], metavar="FIELD=A,B",
        help="fields whose values change together; may be repeated")  # fmt: skip
    add("--seeds", type=int, default=1, help="number of seeds: 0, 1, ... (default: 1)")
    add("--random", type=int, default=0, metavar="N",
        help="only N combinations, drawn at random, always the same ones")  # fmt: skip
    add("--scale", choices=("auto", "laptop", "full"), default="auto",
        help="scale of the experiments (default: auto)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/sweep"), metavar="DIR",
        help="directory of the sweep (default: runs/sweep)")  # fmt: skip
    add("--store", type=Path, default=None, metavar="DIR",
        help="directory of run directories, shared by sweeps (default: OUT/../store)")  # fmt: skip
    add("--executor", default="local", help="local or slurm (default: local)")
    add("--processes", type=int, default=0, metavar="N",
        help="local: runs at a time (default: one per accelerator, or one)")  # fmt: skip
    add("--sbatch", default="", metavar="WORDS",
        help='slurm: further options, such as --sbatch="--gres=gpu:1 --time=4:00:00"')  # fmt: skip
    add("--dry_run", action="store_true", help="list the runs and exit")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    from afa.io import write_json
    from afa.sweeps import sweep as sweeps

    for name, least in (("seeds", 1), ("random", 0), ("processes", 0)):
        if getattr(chosen, name) < least:
            raise UserError(f"--{name}={getattr(chosen, name)} must be at least {least}")
    runs = planned(chosen)
    sweep = sweeps.Sweep(runs, chosen.out, chosen.store or chosen.out.parent / "store")
    if chosen.dry_run:
        _list(sweep)
        return 0
    states = sweeps.execute(sweep, _executor(chosen), _shown(len(runs)))
    write_json(sweep.summary, sweeps.summarise(sweep))
    failures = sweep.failures()
    failed = [name for name, state in states.items() if state == "failed"]
    for name in failed:
        note(f"failed    {name}: {failures[name][-1]}")
    print(f"results   {sweep.summary}: {len(runs) - len(failed)} of {len(runs)} runs")
    return EXIT_DIVERGED if failed else 0


def planned(chosen: argparse.Namespace) -> "list[Planned]":
    """Returns the runs of a command line.

    Raises:
      UserError: an unknown experiment, field or value, or values that do not fit together.
    """
    from afa.sweeps.plan import combinations, plan

    exps = _split("--exp", chosen.exp)
    texts = combinations(
        _values("--set", chosen.set), [_values("--zip", each) for each in chosen.zip], chosen.random
    )
    changes = [_typed(exps[0], chosen.scale, each) for each in texts]
    return plan(exps, changes, range(chosen.seeds), chosen.scale)


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


def _executor(chosen: argparse.Namespace) -> Any:
    import shlex

    from afa.errors import choose
    from afa.sweeps.executors import EXECUTORS

    choose("--executor", chosen.executor, EXECUTORS)
    if chosen.executor == "slurm":
        return EXECUTORS["slurm"](chosen.out, shlex.split(chosen.sbatch))
    return EXECUTORS["local"](chosen.processes)


def _shown(count: int):
    """Returns a function that prints a line when the states of the runs change."""
    last: dict[str, str] = {}

    def show(states: dict[str, str]) -> None:
        for name, state in states.items():
            if last.get(name, "waiting") != state:
                finished = sum(each in ("done", "failed") for each in states.values())
                note(f"{finished}/{count}  {state:<8} {name}")
        last.update(states)

    return show


if __name__ == "__main__":
    sys.exit(main())
