"""What a run would cost, without taking a step: parameters, operations, memory."""

import functools
from typing import Any

import jax
import numpy as np

from afa.config import ExperimentConfig, generator_data
from afa.evaluation import variants
from afa.runs import run, setup
from afa.train import steps

GIB = 2**30


def lines(experiment: str, config: ExperimentConfig) -> list[str]:
    """Parameter counts of each network, operations of an image, and memory of a step.

    The data set is loaded (the synthetic one is rendered if it never was), since its classes decide
    the size of the class head; nothing is written to a run directory. The memory is XLA's own plan
    of the compiled step on one device of this machine.

    Raises:
      UserError: any mistake in configuration or data.
    """
    ready = setup.setup(config)
    fresh = jax.eval_shape(ready.fresh_state)
    counts = run.parameters(fresh)
    told = [*setup.describe(ready), f"experiment {experiment}"]
    told += [f"parameters {name:<14}{count:>14,}" for name, count in counts.items()]
    costs = variants.costs(ready.networks, fresh.variables, config)
    for name in ("embedder", "generator", "discriminator"):
        if name in counts:
            told.append(f"operations {name:<14}{getattr(costs, name):>14,.0f} an image, forward")
    state_bytes = sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(fresh)
        if hasattr(leaf.dtype, "itemsize")
    )
    told.append(f"state      {state_bytes / GIB:.2f} GiB (parameters, optimisers, averages)")
    for name, step in _steps(ready).items():
        chosen = config.data if name == "F" else generator_data(config)
        shape = _batch(chosen.image_size, chosen.batch_size)
        plan = jax.jit(step, donate_argnums=0).lower(fresh, shape).compile().memory_analysis()
        if plan is not None:
            peak = plan.temp_size_in_bytes + plan.argument_size_in_bytes
            told.append(f"memory     {peak / GIB:.2f} GiB at the peak of a step of {name}")
    return told


def _batch(size: int, rows_: int) -> dict[str, jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((rows_, size, size, 3), np.uint8)
    number = jax.ShapeDtypeStruct((rows_,), np.int32)
    return {"clean": image, "image": image, "label": number, "corruption": number}


def _steps(ready: setup.Setup) -> dict[str, Any]:
    context, plan = ready.context, ready.plan
    perturb = plan.plain < plan.embedder_steps
    found = {"F": functools.partial(steps.embedder_step, context=context, perturb=perturb)}
    if plan.generator_steps:
        found["G and D"] = functools.partial(steps.generator_step, context=context)
    return found
