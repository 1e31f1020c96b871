"""Optimisers and learning-rate schedules of the networks, and the moving average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from afa.config import ExperimentConfig, OptimConfig, steps_of
from afa.errors import choose
from afa.models.generators import LOCALISED
from afa.models.networks import build_backbone, frozen_parts

Optimisers = dict[str, optax.GradientTransformation]


def _decayed(params: PyTree) -> PyTree:
    """Mask of the parameters with weight decay: kernels, not biases, norms, powers and proxies."""
    return jax.tree.map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


OPTIMISERS: dict[str, Callable[[optax.Schedule, OptimConfig], optax.GradientTransformation]] = {
    "adamw": lambda rate, c: optax.adamw(rate, weight_decay=c.weight_decay, mask=_decayed),
    # Decay after the momentum, which does not accumulate it (SGDW: Loshchilov & Hutter 2019,
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
    """Clips gradients to the global norm `limit`.

    XLA fuses the multiplication by one factor with the use of the gradient; optax divides by the
    norm, which writes and reads a clipped copy of the whole gradient.
    """

    def init(params: Any) -> Any:
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        factor = limit / jnp.maximum(optax.tree.norm(updates), limit)
        return jax.tree.map(lambda each: factor * each, updates), state

    return optax.GradientTransformation(init, update)


def learning_rate(config: OptimConfig, peak: float, steps: int, epoch: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then decay to zero (or constant) over `steps` training steps.

    Raises:
      UserError: the warm-up is not a duration.
    """
    updates = max(steps // config.accumulate, 1)
    warmup = steps_of("optim.warmup", config.warmup, total=steps, epoch=epoch) // config.accumulate
    rest = max(updates - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if warmup == 0:
        return after
    # Starts at peak / warmup instead of 0, so that the first update has an effect.
    first = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([first, after], [warmup])


def _backbone_part(path: tuple) -> str:
    """Returns the backbone part that a parameter of F belongs to; "" for other parameters."""
    keys = [getattr(key, "key", "") for key in path]
    return keys[1] if keys[0] == "backbone" else ""


def freeze(is_frozen: Callable[[str], bool]) -> optax.GradientTransformation:
    """Zeroes updates of frozen backbone parts; XLA then does not compute their gradients."""

    def masked(path: tuple, update: Array) -> Array:
        name = _backbone_part(path)
        return jnp.zeros_like(update) if name and is_frozen(name) else update

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(masked, updates))


def slow_backbone(rate: float, after: int) -> optax.GradientTransformation:
    """Multiplies the updates of the backbone by 0 for the first `after` updates, then by `rate`."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        factor = jnp.where(state < after, 0.0, rate)
        scaled = jax.tree.map_with_path(
            lambda path, each: factor * each if _backbone_part(path) else each, updates
        )
        return scaled, optax.safe_increment(state)

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def optimisers(
    config: ExperimentConfig, embedder_steps: int, generator_steps: int, epoch: int
) -> Optimisers:
    """Returns one optimiser per network, with clipping and accumulation.

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

    def adam(peak: float, momentum: float) -> optax.GradientTransformation:
        rate = learning_rate(optim, peak, generator_steps, epoch)
        return finish(optax.adam(rate, b1=momentum, b2=0.99))

    rate = learning_rate(optim, optim.learning_rate, embedder_steps, epoch)
    core = [choose("optim.name", optim.name, OPTIMISERS)(rate, optim)]
    head_only = steps_of("optim.head_warmup", optim.head_warmup, total=embedder_steps, epoch=epoch)
    if optim.backbone_rate != 1 or head_only:
        core.append(slow_backbone(optim.backbone_rate, head_only // optim.accumulate))
    backbone, frozen = build_backbone(config), frozen_parts(config)
    frozen_mask = freeze(lambda name: frozen.holds(backbone, name))
    return {
        # First, so that clipping ignores frozen gradients; last, so that they are not decayed.
        "embedder": optax.chain(frozen_mask, finish(*core), frozen_mask),
        "loss": finish(core[0]),  # parameters of the metric loss
        # G learns mostly from reconstruction, which momentum speeds up, and so does a D that
        # localises from known damage; else D has the low momentum of adversarial training (Radford
        # et al. 2016).
        "generator": adam(optim.generator_learning_rate, momentum=0.9),
        "discriminator": adam(
            optim.discriminator_learning_rate,
            momentum=0.9 if config.generator.name in LOCALISED else 0.5,
        ),
    }


def move_average(average: PyTree, now: PyTree, decay: float, updates: Int[Array, ""]) -> PyTree:
    """average' = d * average + (1 - d) * now with d = min(decay, (1 + n) / (10 + n)).

    n is the number of earlier updates of this network, not of steps of the run. With this warm-up
    the initial weights lose their influence within a few hundred updates.
    """
    n: Float[Array, ""] = updates.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda old, new: d * old + (1 - d) * new, average, now)
