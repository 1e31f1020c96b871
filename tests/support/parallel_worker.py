"""Run by test_parallel.py in separate processes, each with its own number of devices.

python parallel_worker.py eight DIR            8 devices: all comparisons, and a checkpoint
python parallel_worker.py four DIR             4 devices: resumes from that checkpoint
python parallel_worker.py pair DIR INDEX PORT  2 processes of 2 devices each
"""

import functools
import pickle
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny
from own_losses import CrossBatchMemory

from afa import parallel
from afa.config import ExperimentConfig
from afa.errors import UserError
from afa.losses import LOSSES
from afa.train import steps
from afa.train.checkpoint import Checkpoints, Position
from afa.train.state import TrainState, checkpoint_id
from afa.train.steps import Batch, StepContext

STEPS = 3
KINDS = ("norm_softmax", "triplet", "cross_batch_memory")  # losses
SAVED = 2  # step of the checkpoint


def settings(loss: str) -> ExperimentConfig:
    """SGD for F, because Adam turns the rounding of a gradient near zero into a full step."""
    LOSSES["cross_batch_memory"] = CrossBatchMemory
    return tiny.config(**{
        "loss.name": loss, "optim.name": "sgd", "optim.learning_rate": 0.02, "optim.clip": 1.0,
    })  # fmt: skip


def step_of(kind: str, context: StepContext) -> functools.partial:
    if kind == "adversarial":
        return functools.partial(steps.generator_step, context=context)
    return functools.partial(steps.embedder_step, context=context, perturb=True)


def batch_of(number: int, processes: int = 1, index: int = 0) -> Batch:
    """This process's rows of the global batch of a step."""
    rows = 32 // processes
    batch = tiny.batch(32, seed=number)
    return {name: each[index * rows : (index + 1) * rows] for name, each in batch.items()}


def walk(step: Any, state: TrainState, processes: int = 1, index: int = 0) -> dict[Any, Any]:
    """Returns the metrics of every step and the last variables, as host arrays."""
    metrics = []
    for number in range(STEPS):
        state, figures = step(state, batch_of(number, processes, index))
        metrics.append(parallel.to_host(figures))
    memory = {"loss": state.loss_memory}
    return {"metrics": metrics, "variables": parallel.to_host(state.variables | memory)}


def kinds() -> dict[str, tuple[str, StepContext]]:
    contexts = {loss: tiny.context(settings(loss)) for loss in KINDS}
    return {
        "memory": ("perturb", contexts["cross_batch_memory"]),
        "adversarial": ("adversarial", contexts["norm_softmax"]),
        "triplet": ("perturb", contexts["triplet"]),
    }


def message(step: Any, *given: Any) -> str:
    try:
        step(*given)
    except UserError as error:
        return str(error)
    return ""


def eight(folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {"devices": parallel.device_count()}
    steps_by_kind = {}
    for name, (kind, context) in kinds().items():
        step = step_of(kind, context)
        steps_by_kind[name] = parallel.data_parallel(step, "pmap")
        found[name, "pmap"] = walk(steps_by_kind[name], tiny.state(context))
        if name in ("memory", "adversarial"):
            mapped = parallel.data_parallel(step, "shard_map")
            found[name, "shard_map"] = walk(mapped, tiny.state(context))
        # Unmapped, a step runs on one device.
        found[name, "one"] = walk(parallel.compiled_once(step), tiny.state(context))

    context, step = kinds()["memory"][1], steps_by_kind["memory"]
    state = tiny.state(context)
    for number in range(SAVED):
        state, _ = step(state, batch_of(number))
    found["saved"] = parallel.to_host(state), checkpoint_id(state)
    with Checkpoints(folder / "checkpoints", keep_best=0) as checkpoints:
        checkpoints.save(state, Position(SAVED, 1.5), context.config, None)
        # The next step may donate the state, because the save has copied it.
        _, figures = step(state, batch_of(SAVED))
        found["next"] = parallel.to_host(figures)
        checkpoints.finish()

    odd = tiny.batch(12)
    for impl in ("pmap", "shard_map"):
        found["refused", impl] = message(
            parallel.data_parallel(lambda state, batch: (state, batch), impl), state, odd
        )
    return found | mapped_rows()


def mapped_rows() -> dict[Any, Any]:
    seen = []

    def double(shared: Any, rows: Any) -> Any:
        seen.append(rows["x"].shape)
        return {"y": rows["x"] * shared, "n": rows["n"] + 1}

    mapped = parallel.map_rows(double)
    rows = {"x": np.arange(22, dtype=np.float32).reshape(11, 2), "n": np.arange(11)}
    out = {count: mapped(np.float32(2), {k: v[:count] for k, v in rows.items()})
           for count in (11, 8, 1)}  # fmt: skip
    shared = parallel.replicate_local(np.float32(3))
    return {"rows": rows, "mapped": out, "seen": seen, "shared": mapped(shared, rows)}


def four(folder: Path) -> dict[Any, Any]:
    context = kinds()["memory"][1]
    with Checkpoints(folder / "checkpoints", keep_best=0) as checkpoints:
        state, position = checkpoints.restore(tiny.state(context, seed=9), context.config)
    restored = parallel.to_host(state), checkpoint_id(state)
    step = parallel.data_parallel(step_of("perturb", context), "pmap")
    _, figures = step(state, batch_of(position.batch))
    return {
        "devices": parallel.device_count(),
        "restored": restored,
        "position": position,
        "next": parallel.to_host(figures),
    }


def pair(index: int, port: int) -> dict[Any, Any]:
    parallel.start(f"localhost:{port}", 2, index)
    found: dict[Any, Any] = {
        "devices": (parallel.device_count(), parallel.local_device_count()),
        "processes": (parallel.process_count(), parallel.process_index()),
    }
    for name, (kind, context) in kinds().items():
        if name == "memory":  # the same step as "triplet", with another loss
            continue
        step = parallel.data_parallel(step_of(kind, context))
        found[name] = walk(step, tiny.state(context), 2, index)
    return found | mapped_rows()


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    rest = [int(each) for each in sys.argv[3:]]
    found = {"eight": lambda: eight(folder), "four": lambda: four(folder),
             "pair": lambda: pair(*rest)}[task]()  # fmt: skip
    name = "-".join([task, *map(str, rest[:1])])
    (folder / f"{name}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
