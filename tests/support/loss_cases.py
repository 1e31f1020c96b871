"""Settings of every metric loss for tests, and its value, gradients and next state, compiled."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from afa.losses import LOSSES
from afa.losses.base import Loss, State
from afa.models.layers import l2_normalise

CLASSES, DIM = 5, 6
LABELS = np.array([0, 0, 2, 2, 2, 1, 4, 0], np.int32)  # 1 and 4 have no positives, 3 no rows

SETTINGS: dict[str, dict[str, Any]] = {
    "norm_softmax": {"temperature": 0.2},
    "proxy_nca": {"temperature": 0.3},
    "arcface": {"scale": 8.0, "margin": 0.3},
    "cosface": {"scale": 8.0, "margin": 0.3},
    "soft_triple": {"centres": 3, "gamma": 0.2, "scale": 8.0, "tau": 0.4, "margin": 0.1},
    "proxy_anchor": {"scale": 8.0, "margin": 0.3},
    "proxy_synthesis": {"scale": 8.0, "alpha": 0.7, "mu": 1.25},
    "memvir": {"scale": 8.0, "steps": 2, "gap": 1},
    "contrastive": {"margin": 0.3},
    "cross_batch_memory": {"margin": 0.2, "size": 20, "weight": 0.6},
    "triplet": {"margin": 0.3},
    "lifted_structure": {"margin": 0.8},
    "multi_similarity": {"alpha": 3.0, "beta": 20.0, "threshold": 0.4, "margin": 0.3},
    "circle": {"gamma": 12.0, "margin": 0.3},
    "nt_xent": {"temperature": 0.2},
    "supcon": {"temperature": 0.2},
    "smooth_ap": {"tau": 0.1},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "arcface, 3 centres": ("arcface", {"scale": 8.0, "margin": 0.3, "centres": 3}),
    "soft_triple, 1 centre": ("soft_triple", {"centres": 1}),
    "proxy_synthesis, few": ("proxy_synthesis", {"scale": 8.0, "mu": 0.4}),
    "memvir, no gap": ("memvir", {"scale": 8.0, "steps": 3, "gap": 0, "warmup": 3}),
    "cross_batch_memory, warm-up": ("cross_batch_memory", {"size": 100, "warmup": 2}),
    "triplet, semi-hard": ("triplet", {"margin": 0.3, "mining": "semi_hard"}),
    "triplet, distance-weighted": ("triplet", {"margin": 0.3, "mining": "distance_weighted"}),
}
CASES: dict[str, Loss] = {name: LOSSES[name](**fields) for name, fields in SETTINGS.items()}
CASES |= {case: LOSSES[name](**fields) for case, (name, fields) in VARIANTS.items()}
# Published settings, as a user gets them, except for the size of the memories.
SMALL: dict[str, dict[str, Any]] = {
    "memvir": {"steps": 2, "gap": 1},
    "cross_batch_memory": {"size": 20},
}
DEFAULTS = {name: LOSSES[name](**SMALL.get(name, {})) for name in LOSSES}

Step = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, labels and proxies


def unit(seed: int, rows: int, dim: int = DIM) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def lengths(seed: int, rows: int) -> np.ndarray:
    """Rows that are not of unit length."""
    return np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)


def initial(loss: Loss, rows: int = len(LABELS), seed: int = 0) -> State:
    return loss.init(jax.random.key(seed), CLASSES, DIM, rows)


@functools.cache
def gradients_of(loss: Loss) -> Any:
    """Returns (free, memory, labels, key) -> ((value, next state), gradients), where `free` has the
    rows "x" and "proxies" before normalisation, and the "params" of the loss."""

    def value(free: dict, memory: Any, y: Array, key: Array) -> tuple[Array, State]:
        x, proxies = l2_normalise(free["x"]), l2_normalise(free["proxies"])
        return loss.apply(State(free["params"], memory), x, y, proxies, key)

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def evaluate(loss: Loss, state: State, step: Step, seed: int = 0) -> tuple[float, dict, State]:
    """Returns value, gradients and next state for the rows, labels and proxies of a step."""
    x, y, proxies = (jnp.asarray(each) for each in step)
    free = {"x": x, "proxies": proxies, "params": state.params}
    (value, after), gradients = gradients_of(loss)(free, state.memory, y, jax.random.key(seed))
    # The memory alone carries over.
    return float(value), jax.tree.map(np.asarray, gradients), state.replace(memory=after.memory)


def after_steps(loss: Loss, state: State, steps: Sequence[Step]) -> State:
    for step in steps:
        _, _, state = evaluate(loss, state, step)
    return state


def batches(count: int, seed: int = 100) -> list[Step]:
    """Random steps with the labels in random order."""
    draw = np.random.default_rng(seed)
    return [
        (lengths(seed + 2 * i, len(LABELS)), draw.permutation(LABELS),
         lengths(seed + 2 * i + 1, CLASSES))
        for i in range(count)
    ]  # fmt: skip
