"""Training steps of tiny networks, compiled once per process, and what their tests compare."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from afa import parallel
from afa.train import steps

RECORDERS = {
    "embedder": tiny.recorder(2e-3),
    "generator": tiny.recorder(),
    "discriminator": tiny.recorder(0.01),
}
STEP = 4  # a step on which the gradient penalty is computed


@functools.cache
def made(kind, optimisers="recording", **changes):
    """Returns context, state and compiled step; each combination is compiled once."""
    chosen = tiny.config(**{name.replace("__", "."): value for name, value in changes.items()})
    context = tiny.context(chosen, RECORDERS if optimisers == "recording" else None)
    state = tiny.state(context).replace(step=jnp.asarray(STEP, jnp.int32))
    bound = {"plain": functools.partial(steps.embedder_step, perturb=False),
             "perturb": functools.partial(steps.embedder_step, perturb=True),
             "adversarial": steps.generator_step,
             "joint": functools.partial(steps.joint_step, perturb=True),
             "probe": steps.probe_step}[kind]  # fmt: skip
    return context, state, parallel.compiled_once(functools.partial(bound, context=context))


def equal(one, other):
    """Whether all leaves have the same bits."""
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(map(np.array_equal, leaves, others))


def key_of(chosen, name, step):
    """The key of (seed, stream, step), reimplemented."""
    key = jax.random.fold_in(jax.random.key(chosen.seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def row_keys(key, rows):
    return jnp.stack([jax.random.fold_in(key, i) for i in range(rows)])
