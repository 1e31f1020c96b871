"""Speed of a training step compared with PyTorch: `python -m experiments.benchmarks.training`.

Both implementations train the same network with the same initial weights on the same batch: loss,
gradient, clipping, AdamW and moving average. They alternate in one process on the same threads, so
that other load on the machine affects both; ratios are between consecutive turns. Needs the extra
`bench`.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from afa.errors import UserError, choose
from experiments.cli import Parser, note, perform

PROGRAM = "python -m experiments.benchmarks.training"
CLASSES = 100
TOLERANCE = 1e-4  # relative difference of the first losses, in float32
BFLOAT16_TOLERANCE = 3e-2
OURS, THEIRS = "afa", "torch"

# Takes some steps and waits for the last one.
Contender = Callable[[int], None]


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    add = options.add_argument
    add("--backbones", nargs="+", default=["resnet18", "resnet50"], metavar="NAME")
    add("--image_size", type=int, default=None, help="pixels (default: 64; 224 on accelerators)")
    add("--batch_size", type=int, default=None, help="default: 32; 256 on accelerators")
    add("--layouts", nargs="+", default=None, metavar="NAME",
        help="memory layouts of torch, channels_last or NCHW (default: both; on accelerators, with "
        "their long compilation, channels_last)")  # fmt: skip
    add_measurement(options, turns=8, steps=4)
    return options


def add_measurement(options: Parser, turns: int, steps: int) -> None:
    """Adds the options for the number of threads, turns and steps."""
    add = options.add_argument
    add("--threads", type=int, default=os.cpu_count(), help="cores of each implementation")
    add("--turns", type=int, default=turns, help="turns of each implementation")
    add("--steps", type=int, default=steps, help="timed steps per turn, after an untimed one")
    options.add_out()


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    prepare(chosen)
    from afa import parallel
    from afa.console import table
    from afa.io import write_json
    from experiments.benchmarks.torch_twin import LAYOUTS

    fast = parallel.accelerated()
    layouts = chosen.layouts or (["channels_last"] if fast else list(LAYOUTS))
    for name in layouts:
        choose("--layouts", name, LAYOUTS)
    size = chosen.image_size or (224 if fast else 64)
    batch = chosen.batch_size or (256 if fast else 32)
    print(f"{parallel.platform()}, {chosen.threads} threads, {size} px, batch {batch}, "
          f"{chosen.turns} turns of {chosen.steps} steps")  # fmt: skip
    found = {}
    for backbone in chosen.backbones:
        contenders = build(backbone, size, batch, layouts)
        seconds = measure(contenders, chosen.turns, chosen.steps)
        found[backbone] = figures(seconds, batch)
        table(f"{backbone}, training step", *_lines(found[backbone]))
    if chosen.out:
        facts = {"hardware": parallel.platform(), "threads": chosen.threads, "image_size": size,
                 "batch_size": batch, "turns": chosen.turns, "steps": chosen.steps}  # fmt: skip
        write_json(chosen.out, facts | {"backbones": found})
    return 0


def prepare(chosen: argparse.Namespace) -> None:
    """Checks the options of `add_measurement` and restricts both libraries to the same cores.

    Raises:
      UserError: a number that is too small, more threads than cores, or no torch.
    """
    for name, least in {"turns": 2, "steps": 1, "threads": 1}.items():
        if getattr(chosen, name) < least:
            raise UserError(f"--{name}={getattr(chosen, name)} must be at least {least}")
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed; install the extra `bench`")
    _restrict_cores(chosen.threads)
    from afa import runtime

    runtime.keep_memory()


def _restrict_cores(threads: int) -> None:
    """Restricts both libraries to the same cores; must run before they create threads."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise UserError(f"--threads={threads} is more than the {len(cores)} cores of this machine")
    os.sched_setaffinity(0, cores[:threads])
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to torch
    import torch

    torch.set_num_threads(threads)


def build(
    backbone: str, size: int, batch_size: int, layouts: Sequence[str]
) -> dict[str, Contender]:
    """Builds the training steps of both implementations, takes the first step of each, which
    compiles it, and checks that their losses agree.

    Raises:
      UserError: no such backbone, or the losses disagree.
    """
    import jax

    from afa import parallel
    from afa.models.networks import build_networks
    from afa.train import optim, state, steps
    from experiments.benchmarks.torch_twin import Trainer, Twin, load_flax_params

    config = _config(backbone, size, batch_size)
    networks = build_networks(config, CLASSES)
    context = steps.StepContext(networks, optim.optimisers(config, 1, 1, 1), config)
    batch = _batch(size, batch_size)
    fresh = state.create(networks, context.optimisers, config.seed, size, config.loss, batch_size)
    fresh = jax.tree.map(np.asarray, fresh)
    mapped = {
        f"{OURS} baseline": functools.partial(steps.embedder_step, perturb=False),
        f"{OURS} + feature augmentation": functools.partial(steps.embedder_step, perturb=True),
        f"{OURS} G and D": steps.generator_step,
    }
    contenders, losses = {}, {}
    for name, step in mapped.items():
        step = parallel.data_parallel(functools.partial(step, context=context))
        with _noted(name):
            contenders[name], metrics = _ours(step, fresh, batch)
        losses |= {name: metrics["metric_loss"]} if "metric_loss" in metrics else {}
    params = dotted(fresh.variables["embedder"]["params"])
    for layout in layouts:
        name = f"{THEIRS} {layout}"
        with _noted(name):
            twin = load_flax_params(Twin(config, CLASSES), params)
            trainer = Trainer(config, twin, layout)
            losses[name] = float(trainer.step(batch)[0])
        contenders[name] = functools.partial(_theirs, trainer, batch)
    _agree(losses, BFLOAT16_TOLERANCE if parallel.accelerated() else TOLERANCE)
    return contenders


def dotted(params: Any) -> dict[str, np.ndarray]:
    """Nested parameters -> dotted path -> array."""
    import jax

    return {".".join(part.key for part in path): np.asarray(value)
            for path, value in jax.tree.leaves_with_path(params)}  # fmt: skip


def _config(backbone: str, size: int, batch_size: int) -> Any:
    """The recipe from random weights, with a constant learning rate."""
    from afa import parallel
    from afa.config import from_scratch, with_changes
    from experiments.configs import afa_resnet50

    return with_changes(
        from_scratch(afa_resnet50.config(not parallel.accelerated())),
        **{
            "backbone.name": backbone,
            "data.image_size": size,
            "data.batch_size": batch_size,
            "optim.schedule": "constant",
            "optim.warmup": "0",
        },
    )


def _batch(size: int, batch_size: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (batch_size, size, size, 3), np.uint8)
    return {
        "image": images,
        "clean": images,
        "label": draw.integers(0, CLASSES, batch_size).astype(np.int32),
        "corruption": np.zeros(batch_size, np.int32),
        "damage": np.zeros(images.shape[:-1], bool),
    }


@contextlib.contextmanager
def _noted(name: str) -> Iterator[None]:
    """Reports how long a contender took to its first step."""
    began = time.perf_counter()
    yield
    note(f"  {name}: first step after {time.perf_counter() - began:.0f} s")


def _ours(step: Callable, state: Any, batch: Mapping[str, Any]) -> tuple[Contender, dict[str, Any]]:
    """A function that takes steps, and the metrics of the first step."""
    import jax

    kept, metrics = step(state, batch)

    def run(steps: int) -> None:
        nonlocal kept
        out = None
        for _ in range(steps):
            kept, out = step(kept, batch)
        jax.block_until_ready((kept, out))

    return run, {name: np.asarray(value).tolist() for name, value in metrics.items()}


def _theirs(trainer: Any, batch: Mapping[str, np.ndarray], steps: int) -> None:
    out = ()
    for _ in range(steps):
        out = trainer.step(batch)
    for each in out:
        float(each)  # waits for the device


def _agree(losses: Mapping[str, float], tolerance: float) -> None:
    """Checks that the first losses agree."""
    first = next(iter(losses.values()))
    for name, loss in losses.items():
        if not abs(loss - first) <= tolerance * abs(first):
            raise UserError(
                f"the implementations disagree: first loss {first:.6f}, {name} {loss:.6f}"
            )


def measure(contenders: Mapping[str, Contender], turns: int, steps: int) -> dict[str, list[float]]:
    """Measures the seconds per step of every contender in every turn; contenders alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, run in contenders.items():
            run(1)  # warms up threads and caches after the previous contender
            began = time.perf_counter()
            run(steps)
            seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def figures(seconds: Mapping[str, Sequence[float]], batch_size: int) -> dict[str, dict[str, float]]:
    """Computes the metrics of every contender.

    Returns:
      Name -> images per second (median turn), speed relative to the faster layout of torch, and
      cost relative to afa's baseline step; the latter two as means over turns with 95 % intervals.
    """
    from afa.evaluation.statistics import mean_and_interval

    times = {name: np.asarray(each) for name, each in seconds.items()}
    fastest_torch = min(
        (n for n in times if n.startswith(THEIRS)), key=lambda n: np.median(times[n])
    )
    baseline = times[f"{OURS} baseline"]
    found = {}
    for name, each in times.items():
        speed, speed_interval = mean_and_interval(times[fastest_torch] / each)
        cost, cost_interval = mean_and_interval(each / baseline)
        found[name] = {
            "images_per_second": float(batch_size / np.median(each)),
            "speed_over_torch": speed,
            "speed_over_torch_interval": speed_interval,
            "cost_over_baseline": cost,
            "cost_over_baseline_interval": cost_interval,
        }
    return found


def _lines(found: Mapping[str, Mapping[str, float]]) -> tuple[list[list[Any]], list[str]]:
    columns = ["step", "images/s", "speed / torch", "cost / baseline"]
    lines = [
        [
            name,
            f"{each['images_per_second']:,.1f}",
            f"{each['speed_over_torch']:.2f} ± {each['speed_over_torch_interval']:.2f}",
            f"{each['cost_over_baseline']:.2f} ± {each['cost_over_baseline_interval']:.2f}",
        ]
        for name, each in found.items()
    ]
    return lines, columns


if __name__ == "__main__":
    sys.exit(main())
