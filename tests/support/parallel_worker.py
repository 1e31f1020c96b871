"""Run by test_parallel.py in separate processes, each with its own number of devices.

python parallel_worker.py eight DIR            8 devices: all comparisons, and a checkpoint
python parallel_worker.py four DIR             4 devices: resumes from that checkpoint
python parallel_worker.py pair DIR INDEX PORT  2 processes of 2 devices each
"""

import dataclasses
import functools
import pickle
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny
from loss_cases import CASES, CLASSES, DIM

from afa import parallel
from afa.config import ExperimentConfig
from afa.errors import UserError
from afa.losses import metric
from afa.losses.base import State
from afa.models.layers import l2_normalise
from afa.train import steps
from afa.train.checkpoint import Checkpoints, Position
from afa.train.state import TrainState, checkpoint_id
from afa.train.steps import Batch, StepContext

STEPS = 3
KINDS = {  # losses and their settings
    "norm_softmax": {},
    "triplet": {"loss.mining": "distance_weighted"},
    "cross_batch_memory": {"loss.size": 40},
}
SAVED = 2  # step of the checkpoint


def settings(loss: str) -> ExperimentConfig:
    """SGD for F, as in `kinds` for G and D, because Adam turns the rounding of a gradient near zero
    into a full step."""
    return tiny.config(**KINDS[loss], **{
        "loss.name": loss, "data.batch_size": 32, "optim.name": "sgd",
        "optim.learning_rate": 0.02, "optim.clip": 1.0,
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
    own = {name: optax.sgd(0.05) for name in ("generator", "discriminator")}
    contexts = {loss: tiny.context(settings(loss), own) for loss in KINDS}
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
    state, batches = losses_state(), [losses_batch(number) for number in range(STEPS)]
    mapped, single = parallel.data_parallel(losses_step), parallel.compiled_once(losses_step)
    for name, step in {"eight": mapped, "one": single}.items():
        found["losses", name] = trajectory(step, jax.tree.map(jnp.copy, state), batches)
    return found | mapped_rows()


# ---- every loss, on rows without a network -------------------------------------------------------

EVERY = {name: dataclasses.replace(loss, local_weight=0.0, fused_weight=0.0)
         for name, loss in CASES.items()}  # fmt: skip


def losses_batch(number: int) -> Batch:
    draw = np.random.default_rng(number)
    label = draw.integers(0, CLASSES, 16).astype(np.int32)
    return {"x": draw.normal(size=(16, DIM)).astype(np.float32), "label": label}


def losses_state() -> dict[str, Any]:
    """Weights, proxies and parameters of each loss, and the states of the losses."""
    key, names = jax.random.key(0), {"global": DIM}
    states = {name: metric.init(loss, key, CLASSES, names, 16) for name, loss in EVERY.items()}
    draw = np.random.default_rng(9)
    shared = {"w": jnp.ones(DIM), "proxies": jnp.asarray(draw.normal(size=(CLASSES, DIM)))}
    free = {name: shared | {"params": each["global"].params} for name, each in states.items()}
    memory = {name: each["global"].memory for name, each in states.items()}
    return {"free": free, "memory": memory, "step": jnp.zeros((), jnp.int32)}


def losses_step(state: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step of gradient descent for every loss, with a linear network."""
    key = steps.stream(0, "metric_loss", state["step"])
    free, memory, metrics = {}, {}, {}
    for name, loss in EVERY.items():

        def objective(free: Any, name: str = name, loss: Any = loss) -> tuple[Any, Any]:
            x, y = parallel.all_gather((l2_normalise(batch["x"] * free["w"]), batch["label"]))
            states = {"global": State(free["params"], state["memory"][name])}
            blocks = {"global": x, "local": x, "fused": x}
            proxies = dict.fromkeys(blocks, l2_normalise(free["proxies"]))
            return metric.metric_loss(loss, states, blocks, y, proxies, key)

        (value, after), gradient = jax.value_and_grad(objective, has_aux=True)(state["free"][name])
        value, gradient = parallel.pmean((value, gradient))
        norm = optax.tree.norm(gradient)
        free[name] = jax.tree.map(
            lambda a, g, norm=norm: a - 0.1 * g / (1 + norm), state["free"][name], gradient
        )
        memory[name] = after["global"].memory
        metrics[name] = {"value": value, "gradient": gradient}
    return {"free": free, "memory": memory, "step": state["step"] + 1}, metrics


def trajectory(step: Any, state: Any, batches: list[Batch]) -> tuple[list[Any], Any]:
    """Returns values and gradients of every step, and the last state, as host arrays."""
    metrics = []
    for batch in batches:
        state, found = step(state, batch)
        metrics.append(parallel.to_host(found))
    return metrics, parallel.to_host(state)


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
