"""Optimisers and learning-rate schedules of the networks, and the moving average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from afa.config import ExperimentConfig, OptimConfig, steps_of
from afa.errors import choose
from afa.models.networks import build_backbone, frozen_parts

Optimisers = dict[str, optax.GradientTransformation]


def _decayed(params: PyTree) -> PyTree:
    """Weight decay is for kernels; biases, norms, powers and proxies go without."""
    return jax.tree.map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


OPTIMISERS: dict[str, Callable[[optax.Schedule, OptimConfig], optax.GradientTransformation]] = {
    "adamw": lambda rate, c: optax.adamw(rate, weight_decay=c.weight_decay, mask=_decayed),
    # The decay comes after the momentum, which does not gather it (SGDW: Loshchilov & Hutter 2019,
    # algorithm 1).
    "sgd": lambda rate, c: optax.chain(
        optax.trace(decay=0.9, nesterov=True),
        optax.add_decayed_weights(c.weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(rate),
    ),
    "lamb": lambda rate, c: optax.lamb(rate, weight_decay=c.weight_decay, mask=_decayed),
    "lion": lambda rate, c: optax.lion(rate, weight_decay=c.weight_decay, mask=_decayed),
}


def clip_to(limit: float) -> optax.GradientTransformation:
    """Scales gradients of a global norm above `limit` down to it.

    By one factor, which XLA multiplies in where the gradient is used; optax divides by the norm,
    which writes and reads a clipped copy of the whole gradient.
    """

    def init(params: Any) -> Any:
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        factor = limit / jnp.maximum(optax.tree.norm(updates), limit)
        return jax.tree.map(lambda each: factor * each, updates), state

    return optax.GradientTransformation(init, update)


def learning_rate(config: OptimConfig, peak: float, steps: int, epoch: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then decay to zero (or none) over `steps` parameter updates.

    Raises:
      UserError: the warm-up is no duration.
    """
    updates = max(steps // config.accumulate, 1)
    warmup = steps_of("optim.warmup", config.warmup, whole=steps, epoch=epoch) // config.accumulate
    rest = max(updates - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup == 0:
        return after
    # Starting at peak / warmup instead of 0: the first update is not lost.
    first = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([first, after], [warmup])


def _of_backbone(path: tuple) -> str:
    """Name of the backbone's part that a parameter of F belongs to; "" of all others."""
    keys = [getattr(key, "key", "") for key in path]
    return keys[1] if keys[0] == "backbone" else ""


def hold(still: Callable[[str], bool]) -> optax.GradientTransformation:
    """Zero for the still parts of the backbone; XLA then leaves out whatever only they needed."""

    def held(path: tuple, update: Array) -> Array:
        name = _of_backbone(path)
        return jnp.zeros_like(update) if name and still(name) else update

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(held, updates))


def slow_backbone(rate: float, after: int) -> optax.GradientTransformation:
    """Multiplies the backbone's updates: by 0 for `after` updates, by `rate` from then on."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        factor = jnp.where(state < after, 0.0, rate)
        slowed = jax.tree.map_with_path(
            lambda path, each: factor * each if _of_backbone(path) else each, updates
        )
        return slowed, optax.safe_increment(state)

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def optimisers(
    config: ExperimentConfig, embedder_steps: int, generator_steps: int, epoch: int
) -> Optimisers:
    """One optimiser a network, with clipping and accumulation.

    Raises:
      UserError: unknown optimiser or backbone, or malformed duration.
    """
    optim = config.optim

    def finish(*core: optax.GradientTransformation) -> optax.GradientTransformation:
        clip = clip_to(optim.clip) if optim.clip > 0 else optax.identity()
        chained = optax.chain(clip, *core)
        if optim.accumulate == 1:
            return chained
        return optax.MultiSteps(chained, optim.accumulate).gradient_transformation()

    def adam(peak: float) -> optax.GradientTransformation:
        rate = learning_rate(optim, peak, generator_steps, epoch)
        return finish(optax.adam(rate, b1=0.5, b2=0.99))

    rate = learning_rate(optim, optim.learning_rate, embedder_steps, epoch)
    core = [choose("optim.name", optim.name, OPTIMISERS)(rate, optim)]
    alone = steps_of("optim.head_warmup", optim.head_warmup, whole=embedder_steps, epoch=epoch)
    if optim.backbone_rate != 1 or alone:
        core.append(slow_backbone(optim.backbone_rate, alone // optim.accumulate))
    backbone, frozen = build_backbone(config), frozen_parts(config)
    still = hold(lambda name: frozen.holds(backbone, name))
    return {
        # First of all, so that clipping does not see their gradients; and last, against decay.
        "embedder": optax.chain(still, finish(*core), still),
        "loss": finish(core[0]),  # parameters that the metric loss has of its own
        "generator": adam(optim.generator_learning_rate),
        "discriminator": adam(optim.discriminator_learning_rate),
        "gate": adam(optim.generator_learning_rate),
    }


def move_average(average: PyTree, now: PyTree, decay: float, updates: Int[Array, ""]) -> PyTree:
    """average' = d * average + (1 - d) * now with d = min(decay, (1 + n) / (10 + n)).

    n are the earlier updates of this network, not the steps of the run. The warm-up of the decay
    lets a network of a few hundred updates forget its first weights.
    """
    n: Float[Array, ""] = updates.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda old, new: d * old + (1 - d) * new, average, now)
