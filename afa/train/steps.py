"""The training steps: pure functions of (state, batch), for one device's rows of the batch.

`embedder_step` moves F; `generator_step` plays one round of D, then G, on frozen F; `joint_step`
does both. `afa.parallel` maps them over devices; every loss that compares images sees the whole
global batch, and random numbers belong to (seed, stream, step, row).
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from afa import parallel
from afa.config import ExperimentConfig
from afa.losses import adversarial as game
from afa.losses.base import State
from afa.losses.metric import metric_loss
from afa.losses.norm_softmax import norm_softmax
from afa.models import layers
from afa.models.discriminator import diffaugment
from afa.models.embedder import Descriptors, named
from afa.models.fusion import fuse, shares
from afa.models.networks import Networks
from afa.train import health
from afa.train.optim import Optimisers
from afa.train.state import TrainState, apply_gradients

Batch = dict[str, Any]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What a step is bound to: modules, optimisers and settings; nothing that changes."""

    networks: Networks
    optimisers: Optimisers
    config: ExperimentConfig


class Generated(NamedTuple):
    """What G makes in a step: of the corrupted images, of noise, and of the codes of the clean
    images; and how far the codes are from noise."""

    restored: Float[Array, "b h w 3"]
    sampled: Float[Array, "b h w 3"]
    coded: Float[Array, "b h w 3"]
    divergence: Float[Array, ""]


def stream(seed: int, name: str, step: Int[Array, ""]) -> Key[Array, ""]:
    """The key of a named stream of random numbers at a step."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def to_unit(images: Array) -> Float[Array, "b h w 3"]:
    """uint8 images -> [0, 1]."""
    return images.astype(jnp.float32) / 255


def embedder_step(
    state: TrainState, batch: Batch, *, context: StepContext, perturb: bool
) -> tuple[TrainState, Metrics]:
    """Moves F on 1/2 metric(F_0(x)) + 1/2 metric(F_1(h + delta)), or the first term alone.

    The lower part runs forward and backward once: the pull-back of the clean upper part gives both
    the direction of the push and its share of the gradient (A-FAN, Chen et al. 2021).

    Where the metric loss has a memory, every term sees it as it was before the step, and the clean
    descriptors alone change it: an image enters it once.
    """
    config, embedder = context.config, context.networks.embedder
    images, labels = to_unit(batch["image"]), parallel.all_gather(batch["label"])
    variables = state.variables["embedder"]

    def lower(params: PyTree) -> tuple[Array, PyTree]:
        mid, changed = layers.apply(embedder,
            variables | {"params": params}, images, train=True,
            method="lower", mutable=["batch_stats"],
        )  # fmt: skip
        return mid, changed["batch_stats"]

    def upper(params: PyTree, mid: Array, stats: PyTree, branch: str) -> tuple[Array, Any]:
        descriptors, changed = layers.apply(embedder,
            {"params": params["embedder"], "batch_stats": stats}, mid, train=True, branch=branch,
            method="upper", mutable=["batch_stats"],
        )  # fmt: skip
        loss, kept = _metric(state, context, params, descriptors, labels)
        return loss, (changed["batch_stats"], *kept)

    params = _trained(state)
    mid, vjp_lower, stats = jax.vjp(lower, params["embedder"], has_aux=True)
    clean, vjp_upper, (stats, blocks, states) = jax.vjp(
        lambda p, h: upper(p, h, stats, "clean"), params, mid, has_aux=True
    )
    gradient, cotangent = vjp_upper(jnp.ones_like(clean))
    metrics = {"metric_loss": clean, **health.embedding(blocks["fused"], labels)}
    if perturb:
        delta = _perturbation(state, config, mid, cotangent)
        perturbed, vjp_perturbed, (stats, *_) = jax.vjp(
            lambda p, h: upper(p, h, stats, "adversarial"), params, mid + delta, has_aux=True
        )
        both = (gradient, cotangent), vjp_perturbed(jnp.ones_like(perturbed))
        gradient, cotangent = jax.tree.map(lambda a, b: 0.5 * (a + b), *both)
        metrics["adversarial_metric_loss"] = perturbed
    own = jax.tree.map(jnp.add, gradient["embedder"], vjp_lower(cotangent)[0])
    gradient |= {"embedder": own}
    if config.train.schedule == "joint" and config.adversarial.generated_views > 0:
        extra, stats, loss = _generated_views(state, batch, context, stats)
        gradient = jax.tree.map(jnp.add, gradient, extra)
        metrics["generated_metric_loss"] = loss
    state, norms = _moved(state, context, parallel.pmean(gradient), stats)
    state = state.replace(
        step=state.step + 1, loss_memory={name: each.memory for name, each in states.items()}
    )
    return state, parallel.pmean(metrics) | norms


def _perturbation(
    state: TrainState, config: ExperimentConfig, mid: Array, cotangent: Array
) -> Array:
    """What is added to the mid map: along its cotangent, or in a random direction."""
    keys = parallel.sample_keys(stream(config.seed, "push", state.step), len(mid))
    direction = cotangent
    if config.adversarial.feature_direction == "random":
        others = parallel.sample_keys(stream(config.seed, "direction", state.step), len(mid))
        direction = jax.vmap(lambda k: jax.random.normal(k, mid.shape[1:]))(others)
    return game.feature_perturbation(mid, direction, keys, config.adversarial.feature_epsilon)


def _trained(state: TrainState) -> dict[str, PyTree]:
    """The parameters that the metric loss trains: F's, and its own where it has any."""
    return {
        name: state.variables[name]["params"] if name in state.variables else {}
        for name in ("embedder", "loss")
    }


def _moved(
    state: TrainState, context: StepContext, gradient: dict[str, PyTree], stats: PyTree
) -> tuple[TrainState, Metrics]:
    """Moves F, and the loss's own parameters where it has any."""
    decay, norms = context.config.optim.ema_decay, {}
    for name, found in {"embedder": stats, "loss": None}.items():
        if name in state.variables:
            state, norm = apply_gradients(
                state, context.optimisers[name], name, gradient[name], found, decay
            )
            norms |= norm
    return state, norms


def _metric(
    state: TrainState, context: StepContext, params: PyTree, descriptors: Descriptors,
    labels: Int[Array, "n"],
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict[str, State]]]:  # fmt: skip
    """Metric loss of the global batch, its descriptors, and the next state of the loss."""
    proxies = layers.apply(
        context.networks.embedder, {"params": params["embedder"]}, method="proxies"
    )
    blocks = parallel.all_gather(named(descriptors))
    states = state.loss_states(params["loss"])
    loss, states = metric_loss(context.config.loss, states, blocks, labels, proxies)
    return loss, (blocks, states)


def _generated_views(
    state: TrainState, batch: Batch, context: StepContext, stats: PyTree
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    """Gradient, statistics and loss of G's images as training views, through the adversarial
    branch; no gradient reaches G, since labels must not."""
    images, labels = to_unit(batch["image"]), parallel.all_gather(batch["label"])
    restored = jax.lax.stop_gradient(context.networks.restore(state.variables, images))

    def objective(params: PyTree) -> tuple[Array, Any]:
        descriptors, changed = layers.apply(context.networks.embedder,
            {"params": params["embedder"], "batch_stats": stats}, restored, train=True,
            branch="adversarial", mutable=["batch_stats"],
        )  # fmt: skip
        loss, _ = _metric(state, context, params, descriptors, labels)
        return context.config.adversarial.generated_views * loss, changed["batch_stats"]

    (loss, stats), gradient = jax.value_and_grad(objective, has_aux=True)(_trained(state))
    return gradient, stats, loss


def generator_step(
    state: TrainState, batch: Batch, *, context: StepContext
) -> tuple[TrainState, Metrics]:
    """One round of the game on frozen F: D's step, then G's against the new D.

    G runs forward once; the losses of both use its images. The decoder of noise learns from clean
    images too, by their codes; no label enters.
    """
    networks, config = context.networks, context.config
    assert networks.generator is not None
    generator = networks.generator
    clean, images = to_unit(batch["clean"]), to_unit(batch["image"])
    key = stream(config.seed, "game", state.step)
    key_code, key_sample, key_augment = (
        parallel.sample_keys(k, len(clean)) for k in jax.random.split(key, 3)
    )

    def noise(keys: Key[Array, "b"]) -> Float[Array, "b z"]:
        return jax.vmap(lambda k: jax.random.normal(k, (networks.latent_dim,)))(keys)

    def generate(params: PyTree) -> Generated:
        variables = {"params": params}
        mean, log_variance = layers.apply(generator, variables, clean, method="encode")
        code = mean + jnp.exp(0.5 * log_variance) * noise(key_code)
        z = jnp.concatenate([noise(key_sample), code])
        sampled, coded = jnp.split(layers.apply(generator, variables, z, method="sample"), 2)
        restored = layers.apply(generator, variables, images, method="restore")
        return Generated(restored, sampled, coded, game.code_divergence(mean, log_variance))

    made, vjp = jax.vjp(generate, state.variables["generator"]["params"])
    frozen = _frozen(state, config)
    fakes = (made.restored, made.sampled)
    state, judged = _discriminator_update(state, context, clean, *fakes, key_augment)
    cotangents, losses = _generator_cotangents(state, context, frozen, clean, made, key_augment)
    gradient = parallel.pmean(vjp(cotangents)[0])
    state, norm = apply_gradients(
        state, context.optimisers["generator"], "generator", gradient, None, config.optim.ema_decay
    )
    metrics = parallel.pmean(judged | losses) | norm
    if config.adversarial.gate == "learned":
        state, gated = _gate_update(state, context, frozen, images, batch["label"])
        metrics |= gated
    metrics |= health.restoration(images, made.restored, clean, batch["corruption"], config)
    return state.replace(step=state.step + 1), metrics


def _frozen(state: TrainState, config: ExperimentConfig) -> PyTree:
    """The variables of F that the game sees: the averaged ones that will search, or, while F still
    moves, the present ones."""
    joint = config.train.schedule == "joint"
    return jax.lax.stop_gradient((state.variables if joint else state.average)["embedder"])


def _discriminator_update(
    state: TrainState,
    context: StepContext,
    clean: Array,
    restored: Array,
    sampled: Array,
    keys: Array,
) -> tuple[TrainState, Metrics]:
    """D: cross-entropy of real against restored and sampled images, and lazy R1."""
    config, module = context.config.adversarial, context.networks.discriminator
    assert module is not None
    variables = state.variables["discriminator"]
    fakes = _fakes(config, restored, sampled)

    def objective(params: PyTree) -> tuple[Array, Any]:
        def verdict(images: Array, keys: Array) -> tuple[Array, PyTree]:
            out, changed = layers.apply(module,
                variables | {"params": params}, _augmented(config, images, keys), train=True,
                mutable=["batch_stats"],
            )  # fmt: skip
            return out.logit, changed.get("batch_stats", {})

        # One pass over all images; each group meets the same augmentation.
        groups = [clean, *fakes]
        logits, stats = verdict(jnp.concatenate(groups), jnp.concatenate([keys] * len(groups)))
        real, fake = logits[: len(clean)], logits[len(clean) :]
        loss = game.discriminator_loss(real, fake)
        penalty = jax.lax.cond(
            (config.r1 > 0) & (state.step % config.r1_every == 0),
            lambda: game.r1_penalty(lambda x: verdict(x, keys)[0], clean),
            lambda: jnp.zeros(()),
        )
        total = loss + config.r1 * config.r1_every * penalty
        return total, (stats, {"discriminator_loss": loss, "r1": penalty * config.r1_every,
                               "d_real": real.mean(), "d_fake": fake.mean()})  # fmt: skip

    gradient, (stats, metrics) = jax.grad(objective, has_aux=True)(variables["params"])
    state, norm = apply_gradients(
        state, context.optimisers["discriminator"], "discriminator", parallel.pmean(gradient),
        parallel.pmean(stats), 0.0,
    )  # fmt: skip
    return state, metrics | norm


def _fakes(config: Any, restored: Array, sampled: Array) -> list[Array]:
    """The generated images that take part in the game."""
    parts = [restored] * (config.lambda_adversarial > 0) + [sampled] * (config.lambda_noise > 0)
    return parts or [restored]


def _augmented(config: Any, images: Array, keys: Array) -> Array:
    return diffaugment(images, keys) if config.diffaugment else images


def _generator_cotangents(
    state: TrainState,
    context: StepContext,
    frozen: PyTree,
    clean: Array,
    made: Generated,
    keys: Array,
) -> tuple[Generated, Metrics]:
    """Gradient of G's loss with respect to what G made:

    lambda_mse reconstruction(x^, x) + lambda_adversarial softplus(-D(x^))
    + lambda_noise softplus(-D(G(z))) + lambda_features (1 - F(x^) . F(x)), global and local
    descriptors alike, + lambda_code (reconstruction(G(code of x), x) + CODE_PRIOR divergence).
    """
    config, networks = context.config.adversarial, context.networks
    assert networks.discriminator is not None
    judge = networks.discriminator

    def fool(images: Array) -> Array:
        verdict = layers.apply(
            judge, state.variables["discriminator"], _augmented(config, images, keys), train=False
        )
        return game.generator_loss(verdict.logit)

    def distance(images: Array) -> Array:
        target = layers.apply(networks.embedder, frozen, clean, train=False)
        found = layers.apply(networks.embedder, frozen, images, train=False)
        apart = [
            1 - jnp.mean(jnp.sum(a * jax.lax.stop_gradient(b), -1))
            for a, b in zip(found, target, strict=True)
        ]
        return jnp.sum(jnp.stack(apart))

    def objective(made: Generated) -> tuple[Array, Metrics]:
        def code() -> Array:
            return game.reconstruction(made.coded, clean) + game.CODE_PRIOR * made.divergence

        terms = {
            "g_mse": (config.lambda_mse, lambda: game.reconstruction(made.restored, clean)),
            "g_adversarial": (config.lambda_adversarial, lambda: fool(made.restored)),
            "g_features": (config.lambda_features, lambda: distance(made.restored)),
            "g_noise": (config.lambda_noise, lambda: fool(made.sampled)),
            "g_code": (config.lambda_code, code),
        }
        values = {name: term() for name, (weight, term) in terms.items() if weight > 0}
        total = sum((terms[name][0] * value for name, value in values.items()), jnp.zeros(()))
        return total, values | {"generator_loss": total}

    return jax.grad(objective, has_aux=True)(made)


def _gate_update(
    state: TrainState, context: StepContext, frozen: PyTree, images: Array, label: Array
) -> tuple[TrainState, Metrics]:
    """Trains the learned gate of the restored view with the metric loss on frozen F, G and D, all
    of them as they will search: of G that is the average."""
    networks = context.networks
    restored = networks.restore(state.search_variables(), images)
    assert networks.gate is not None and networks.discriminator is not None
    gate, judge = networks.gate, networks.discriminator
    x, r = (
        layers.apply(networks.embedder, frozen, each, train=False).global_descriptor
        for each in (images, restored)
    )
    logits = [layers.apply(judge, state.variables["discriminator"], each, train=False).logit
              for each in (images, restored)]  # fmt: skip
    proxies = layers.apply(networks.embedder, frozen, method="proxies")["global"]
    weights = {"global": 1.0, "restored": 1.0}
    # Classes stand in for gallery images, which have one descriptor in both blocks.
    targets = fuse({"global": proxies, "restored": proxies}, weights)
    fixed = jax.lax.stop_gradient((x, r, *logits))

    def objective(params: PyTree) -> Array:
        opened = layers.apply(gate, {"params": params}, *fixed)
        fused = fuse(
            {"global": fixed[0], "restored": fixed[1]}, weights, shares("learned", opened)
        )  # fmt: skip
        rows, labels = parallel.all_gather((fused, label))
        temperature = context.config.loss.posterior_temperature
        return norm_softmax(rows, labels, targets, temperature)

    loss, gradient = jax.value_and_grad(objective)(state.variables["gate"]["params"])
    state, norm = apply_gradients(
        state, context.optimisers["gate"], "gate", parallel.pmean(gradient), None, 0.0
    )
    return state, {"gate_loss": parallel.pmean(loss)} | norm


def joint_step(
    state: TrainState, batch: Batch, *, context: StepContext, perturb: bool
) -> tuple[TrainState, Metrics]:
    """F's step and one round of the game on the same batch; the clock moves once."""
    after, moved = embedder_step(state, batch, context=context, perturb=perturb)
    after, played = generator_step(after.replace(step=state.step), batch, context=context)
    return after, moved | played


def probe_step(
    state: TrainState, batch: Batch, *, context: StepContext
) -> tuple[TrainState, Metrics]:
    """The figures of the game that cost extra, for log lines; the state is handed back as it is."""
    networks, config = context.networks, context.config
    key = stream(config.seed, "probe", state.step)
    frozen, images = _frozen(state, config), to_unit(batch["image"])
    return state, health.snapshot(networks, state, frozen, images, batch["label"], key)
