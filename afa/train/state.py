"""Training state: one frozen pytree for all networks."""

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from afa import parallel
from afa.losses import metric
from afa.losses.base import Loss, State
from afa.models.embedder import dims
from afa.models.networks import Networks
from afa.train.optim import Optimisers, move_average

AVERAGED = ("embedder", "generator")


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes. Random numbers are derived from the step, never stored.

    Attributes:
      step: number of completed steps, an int32 scalar. (Any, because the leaves may also be shapes
        for restoring a checkpoint, or host values.)
      variables: network -> {"params", "batch_stats"}; also "loss", by descriptor block, if the
        metric loss has parameters.
      opt_state: network -> state of its optimiser.
      average: "embedder", "generator" -> moving average of their variables.
      updates: network -> number of parameter updates, an int32 scalar. It differs from `step`: in
        a staged run G starts late, and with `optim.accumulate` most steps update no parameters.
      loss_memory: descriptor block -> memory of the metric loss; the same on every device.
    """

    step: Any
    variables: dict[str, PyTree]
    opt_state: dict[str, PyTree]
    average: dict[str, PyTree]
    updates: dict[str, Any]
    loss_memory: dict[str, PyTree] = flax.struct.field(default_factory=dict)

    def search_variables(self) -> dict[str, PyTree]:
        """Variables for evaluation and export: averages if available; without "loss"."""
        variables = self.variables | self.average
        return {name: each for name, each in variables.items() if name != "loss"}

    def loss_states(self, params: dict[str, PyTree]) -> dict[str, State]:
        """Returns the state of the metric loss by descriptor block, with these parameters."""
        return {name: State(params.get(name, {}), each) for name, each in self.loss_memory.items()}


@parallel.on_cpu()
def create(
    networks: Networks, optimisers: Optimisers, seed: int, image_size: int, loss: Loss, rows: int
) -> TrainState:
    """Returns the initial state; the same for the same seed.

    It is computed on the CPU, because a GPU takes most of a minute to compile its small programs.

    Args:
      rows: number of images of the global batch, which a memory of the loss may depend on.
    """
    variables = networks.init(jax.random.key(seed), image_size)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"loss"))
    embedder = networks.embedder
    states = metric.init(loss, key, embedder.classes, dims(embedder), rows)
    if params := {name: each.params for name, each in states.items() if each.params}:
        variables |= {"loss": {"params": params, "batch_stats": {}}}
    memory = {name: each.memory for name, each in states.items()}
    # A copy, because an alias would be donated twice.
    average = {name: jax.tree.map(jnp.copy, variables[name])
               for name in AVERAGED if name in variables}  # fmt: skip
    opt_state = {name: optimisers[name].init(each["params"]) for name, each in variables.items()}
    updates = {name: jnp.zeros((), jnp.int32) for name in variables}
    return TrainState(jnp.zeros((), jnp.int32), variables, opt_state, average, updates, memory)


def with_backbone(
    initial: TrainState, load: Callable[[dict[str, PyTree]], dict[str, PyTree]]
) -> TrainState:
    """Returns an initial state with other values of the backbone and of its average.

    Args:
      load: {"params", "batch_stats"} of the backbone -> the same with new values.
    """

    def loaded(embedder: dict[str, PyTree]) -> dict[str, PyTree]:
        # Without BatchNorm a backbone has no statistics.
        new = load({name: tree.get("backbone", {}) for name, tree in embedder.items()})
        arrays = jax.tree.map(jnp.asarray, new)
        return {
            name: tree | ({"backbone": arrays[name]} if "backbone" in tree else {})
            for name, tree in embedder.items()
        }

    return initial.replace(
        variables=initial.variables | {"embedder": loaded(initial.variables["embedder"])},
        average=initial.average | {"embedder": loaded(initial.average["embedder"])},
    )


def apply_gradients(
    state: TrainState,
    optimiser: optax.GradientTransformation,
    network: str,
    gradients: PyTree,
    batch_stats: PyTree | None,
    decay: float,
) -> tuple[TrainState, dict[str, Any]]:
    """Updates one network: parameters, optimiser, batch statistics and moving average.

    The average and the count of its warm-up change only when the parameters do, not in steps that
    only accumulate gradients (`optim.accumulate`).

    Returns:
      The new state and {"<network>_gradient_norm": ...}.
    """
    before = state.variables[network]
    updates, opt_state = optimiser.update(gradients, state.opt_state[network], before["params"])
    after = {
        "params": optax.apply_updates(before["params"], updates),
        "batch_stats": before["batch_stats"] if batch_stats is None else batch_stats,
    }
    count = state.updates[network]
    # Only an optimiser with accumulation has this counter, of its parameter updates.
    counted = optax.tree.get(opt_state, "gradient_step", count + 1)
    average = state.average
    if network in average:
        moved = move_average(average[network], after, decay, count)
        average = average | {network: optax.tree.where(counted > count, moved, average[network])}
    state = state.replace(
        variables=state.variables | {network: after},
        opt_state=state.opt_state | {network: opt_state},
        average=average,
        updates=state.updates | {network: counted},
    )
    return state, {f"{network}_gradient_norm": optax.tree.norm(gradients)}


def checkpoint_id(trained: TrainState) -> str:
    """Returns `step-N-` and a digest of the variables used in search; an index is tied to it."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parallel.to_host(trained.search_variables())):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return f"step-{int(trained.step)}-{digest.hexdigest()[:16]}"
