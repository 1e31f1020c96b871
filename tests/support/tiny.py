"""Minimal networks, for tests that compile complete training steps."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from afa.config import ExperimentConfig, GeneratorConfig, with_changes
from afa.losses import metric
from afa.models import generators
from afa.models.backbones.resnet import ResNet
from afa.models.discriminator import Discriminator
from afa.models.embedder import Embedder, dims
from afa.models.networks import Networks
from afa.train import optim
from afa.train.state import TrainState, create
from afa.train.steps import Batch, StepContext

SIDE = 16
CLASSES = 6
HIDDEN = (3, 9)  # side of the hidden square of a corrupted image
# Larger than in a real run, so that the perturbation is well above rounding errors.
EPSILON = 0.2


def config(**changes) -> ExperimentConfig:
    """Returns the settings of a tiny run; dotted fields may be changed."""
    base = {
        "seed": 3,
        "data.image_size": SIDE,
        "generator.name": "inpainting",  # the one with most parts: its D localises damage
        "train.precision": "float32",
        "adversarial.feature_epsilon": EPSILON,
        "adversarial.lambda_adversarial": 0.5,
        "adversarial.lambda_noise": 0.5,
        "optim.warmup": "0",
        "optim.ema_decay": 0.9,
    }
    return with_changes(ExperimentConfig(), **(base | changes))


def networks(chosen: ExperimentConfig) -> Networks:
    """Returns an embedder of two blocks (mid map 4x4, last map 2x2), and a generator and a
    discriminator of two levels."""
    embedder = Embedder(ResNet("basic", (1, 1), width=8), 12, 6, CLASSES, 0.2)
    shape = GeneratorConfig(chosen.generator.name, width=4, levels=2, blocks=1, latent_dim=5)
    generator, space = generators.build(shape, embedder, SIDE, jnp.float32)
    localise = chosen.generator.name in generators.LOCALISED
    discriminator = Discriminator(
        4, 2, chosen.discriminator.spectral_norm, space=space, localise=localise
    )
    joint = chosen.train.schedule == "joint" and chosen.adversarial.generated_views > 0
    return Networks(
        embedder, generator, discriminator, 5,
        ("flip",), "adversarial" if joint else "clean",
    )  # fmt: skip


def context(
    chosen: ExperimentConfig, own: Mapping[str, optax.GradientTransformation] | None = None
) -> StepContext:
    """Returns the context of a step; `own` replaces optimisers by name."""
    return StepContext(
        networks(chosen), {**optim.optimisers(chosen, 10, 10, 5), **(own or {})}, chosen
    )


def recorder(rate: float = 0.0) -> optax.GradientTransformation:
    """Returns an optimiser whose state is the last gradient; its updates are -`rate` times it."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -rate * g, updates), updates

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def state(of: StepContext, seed: int = 0) -> TrainState:
    """Returns a state with weights from NumPy, without the zeros and ones of usual initialisation.

    Only shapes come from `create`, because compiling the initialisers takes longer than a step.
    """
    draw = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        noise = draw.standard_normal(leaf.shape).astype(np.float32)
        if name == "kernel":
            gain = 0.05 if path[-2].key == "last" else 1.0  # G hardly changes images
            return noise * np.float32(gain * np.sqrt(2 / np.prod(leaf.shape[:-1])))
        if "head" in name or name == "u":
            return noise
        means = {"power": 3.0, "bias": 0.0, "clean_mean": 0.0, "adversarial_mean": 0.0}
        return np.float32(means.get(name, 1.0)) + np.float32(0.1) * np.abs(noise)

    loss = of.config.loss
    rows = of.config.data.batch_size
    empty = jax.eval_shape(lambda: create(of.networks, of.optimisers, 0, SIDE, loss, rows))
    kept = metric.init(loss, jax.random.key(0), CLASSES, dims(of.networks.embedder), rows)
    variables = jax.tree.map(jnp.asarray, jax.tree.map_with_path(fill, empty.variables))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state={
            name: of.optimisers[name].init(each["params"]) for name, each in variables.items()
        },
        # Different from the variables, so that tests detect a confusion of both.
        average={
            name: jax.tree.map(lambda leaf: 1.1 * leaf, variables[name]) for name in empty.average
        },
        loss_memory={name: each.memory for name, each in kept.items()},
        updates={name: jnp.zeros((), jnp.int32) for name in variables},
    )


def batch(rows: int = 16, seed: int = 0) -> Batch:
    """Returns noisy images whose colour depends on the class; every other one is corrupted by more
    noise and a square of one grey."""
    draw = np.random.default_rng(seed)
    label = (np.arange(rows) // 2 % CLASSES).astype(np.int32)
    tone = np.random.default_rng(99).integers(40, 200, (CLASSES, 1, 1, 3))
    clean = np.clip(tone[label] + draw.normal(0, 30, (rows, SIDE, SIDE, 3)), 0, 255)
    corruption = (np.arange(rows) % 2).astype(np.int32)
    noise = draw.normal(0, 40, clean.shape) * corruption[:, None, None, None]
    damage = np.zeros(clean.shape[:-1], bool)
    for row in np.flatnonzero(corruption):
        y, x, side = *draw.integers(0, SIDE - HIDDEN[1], 2), draw.integers(*HIDDEN)
        damage[row, y : y + side, x : x + side] = True
    image = np.where(damage[..., None], 10, np.clip(clean + noise, 0, 255))
    return {
        "clean": clean.astype(np.uint8),
        "image": image.astype(np.uint8),
        "label": label,
        "corruption": corruption,
        "damage": damage,
    }
