"""Dry run: parameters, operations (FLOPs) and memory of a run, without taking a step."""

import functools
from typing import Any

import jax
import numpy as np

from afa.config import ExperimentConfig, generator_data
from afa.evaluation import variants
from afa.runs import run
from afa.runs.setup import Setup, build_setup, describe
from afa.train import steps

GIB = 2**30


def lines(experiment: str, config: ExperimentConfig) -> list[str]:
    """Returns lines with parameters and operations of each network and the memory of a step.

    The data set is loaded (synthetic data is rendered if it is not cached), because the number of
    classes determines the size of the class head. Nothing is written to a run directory. Memory is
    XLA's memory analysis of the compiled step on one device of this machine.

    Raises:
      UserError: a mistake in configuration or data.
    """
    setup = build_setup(config)
    fresh = jax.eval_shape(setup.fresh_state)
    counts = run.parameters(fresh)
    found = [*describe(setup), f"experiment {experiment}"]
    found += [f"parameters {name:<14}{count:>14,}" for name, count in counts.items()]
    costs = variants.costs(setup.networks, fresh.variables, config)
    for name in ("embedder", "generator", "discriminator"):
        if name in counts:
            found.append(f"operations {name:<14}{getattr(costs, name):>14,.0f} an image, forward")
    state_bytes = sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(fresh)
        if hasattr(leaf.dtype, "itemsize")
    )
    found.append(f"state      {state_bytes / GIB:.2f} GiB (parameters, optimisers, averages)")
    for name, step in _steps(setup).items():
        data = config.data if name == "F" else generator_data(config)
        shape = _batch(data.image_size, data.batch_size)
        plan = jax.jit(step, donate_argnums=0).lower(fresh, shape).compile().memory_analysis()
        if plan is not None:
            peak = plan.temp_size_in_bytes + plan.argument_size_in_bytes
            found.append(f"memory     {peak / GIB:.2f} GiB at the peak of a step of {name}")
    return found


def _batch(size: int, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((batch_size, size, size, 3), np.uint8)
    index = jax.ShapeDtypeStruct((batch_size,), np.int32)
    damage = jax.ShapeDtypeStruct(image.shape[:-1], np.bool_)
    return {
        "clean": image, "image": image, "label": index, "corruption": index, "damage": damage
    }  # fmt: skip


def _steps(setup: Setup) -> dict[str, Any]:
    context, plan = setup.context, setup.plan
    perturb = plan.plain < plan.embedder_steps
    found = {"F": functools.partial(steps.embedder_step, context=context, perturb=perturb)}
    if plan.generator_steps:
        found["G and D"] = functools.partial(steps.generator_step, context=context)
    return found
