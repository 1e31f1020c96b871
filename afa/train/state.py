"""The state of a run: one frozen pytree for all networks."""

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
    """Everything a step changes. Random numbers are derived from the step, never stored.

    Attributes:
      step: steps taken, an int32 scalar; the only clock. (Any, since a state also holds the shapes
        a checkpoint is restored into, and host values.)
      variables: network -> {"params", "batch_stats"}; "loss" among them where the metric loss has
        parameters of its own, by descriptor block.
      opt_state: network -> state of its optimiser.
      average: "embedder", "generator" -> moving average of their variables.
      updates: network -> how often its parameters have moved, an int32 scalar. Not `step`: in a
        staged run G starts late, and with `optim.accumulate` most steps move nothing.
      loss_memory: descriptor block -> what the metric loss keeps from step to step; the same on
        every device.
    """

    step: Any
    variables: dict[str, PyTree]
    opt_state: dict[str, PyTree]
    average: dict[str, PyTree]
    updates: dict[str, Any]
    loss_memory: dict[str, PyTree] = flax.struct.field(default_factory=dict)

    def search_variables(self) -> dict[str, PyTree]:
        """What is evaluated and exported: averages where there are any; nothing of the loss."""
        found = self.variables | self.average
        return {name: each for name, each in found.items() if name != "loss"}

    def loss_states(self, params: dict[str, PyTree]) -> dict[str, State]:
        """The metric loss's state by descriptor block, with these parameters."""
        return {name: State(params.get(name, {}), each) for name, each in self.loss_memory.items()}


def create(
    networks: Networks, optimisers: Optimisers, seed: int, image_size: int, loss: Loss
) -> TrainState:
    """A fresh state; equal for equal seeds."""
    variables = networks.init(jax.random.key(seed), image_size)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"loss"))
    embedder = networks.embedder
    states = metric.init(loss, key, embedder.classes, dims(embedder))
    if params := {name: each.params for name, each in states.items() if each.params}:
        variables |= {"loss": {"params": params, "batch_stats": {}}}
    memory = {name: each.memory for name, each in states.items()}
    # A copy: an alias would be donated twice.
    average = {name: jax.tree.map(jnp.copy, variables[name])
               for name in AVERAGED if name in variables}  # fmt: skip
    opt_state = {name: optimisers[name].init(each["params"]) for name, each in variables.items()}
    updates = {name: jnp.zeros((), jnp.int32) for name in variables}
    return TrainState(jnp.zeros((), jnp.int32), variables, opt_state, average, updates, memory)


def with_backbone(
    fresh: TrainState, fill: Callable[[dict[str, PyTree]], dict[str, PyTree]]
) -> TrainState:
    """A fresh state whose backbone, and its average, hold other values.

    Args:
      fill: {"params", "batch_stats"} of the backbone -> the same with other values.
    """

    def filled(embedder: dict[str, PyTree]) -> dict[str, PyTree]:
        # Without BatchNorm a backbone has no statistics.
        new = fill({name: tree.get("backbone", {}) for name, tree in embedder.items()})
        arrays = jax.tree.map(jnp.asarray, new)
        return {
            name: tree | ({"backbone": arrays[name]} if "backbone" in tree else {})
            for name, tree in embedder.items()
        }

    return fresh.replace(
        variables=fresh.variables | {"embedder": filled(fresh.variables["embedder"])},
        average=fresh.average | {"embedder": filled(fresh.average["embedder"])},
    )


def apply_gradients(
    state: TrainState,
    optimiser: optax.GradientTransformation,
    network: str,
    gradients: PyTree,
    batch_stats: PyTree | None,
    decay: float,
) -> tuple[TrainState, dict[str, Any]]:
    """Moves one network: parameters, optimiser, batch statistics and moving average.

    The average moves, and its warm-up counts, only when the parameters do: a step that still
    collects gradients (`optim.accumulate`) leaves both.

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
    # Only an optimiser that accumulates has such a counter: of the updates that it let through.
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
    """`step-N-` and a digest of the variables that search: what an index is bound to."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parallel.to_host(trained.search_variables())):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return f"step-{int(trained.step)}-{digest.hexdigest()[:16]}"
