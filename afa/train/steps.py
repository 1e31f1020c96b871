"""The training steps: pure functions of (state, batch), for one device's rows of the batch.

`embedder_step` trains F; `generator_step` trains D, then G, with frozen F; `joint_step` does both.
`afa.parallel` maps them over devices. Losses that compare images use the global batch. Random
numbers are derived from (seed, stream, step, row).
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from afa import parallel
from afa.config import AdversarialConfig, ExperimentConfig
from afa.losses import adversarial
from afa.losses.base import State
from afa.losses.metric import metric_loss
from afa.losses.perturbations import PERTURBATIONS, Draws
from afa.models import layers
from afa.models.discriminator import Discriminator, diffaugment
from afa.models.embedder import Descriptors, named
from afa.models.networks import Networks
from afa.models.spaces import Map
from afa.models.views import median
from afa.train import health
from afa.train.optim import Optimisers
from afa.train.state import TrainState, apply_gradients

Batch = dict[str, Any]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StepContext:
    """Modules, optimisers and settings of a step; constant during a run."""

    networks: Networks
    optimisers: Optimisers
    config: ExperimentConfig


class Generated(NamedTuple):
    """Outputs of G in a step: restored images, images sampled from noise, images decoded from the
    codes of clean images (or mid maps, in the space of G); and the divergence of the codes from the
    noise distribution."""

    restored: Map
    sampled: Map
    coded: Map
    divergence: Float[Array, ""]


class Fake(NamedTuple):
    """Images that are not real, and which of them count (1) or not (0)."""

    images: Map
    counted: Float[Array, "b"]


class Damaged(NamedTuple):
    """Images, and which of their pixels are damaged."""

    images: Map
    damage: Bool[Array, "b h w"]


def stream(seed: int, name: str, step: Int[Array, ""]) -> Key[Array, ""]:
    """Returns the key of a named random stream at a step."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def to_unit(images: Array) -> Float[Array, "b h w 3"]:
    """Converts uint8 images to floats in [0, 1]."""
    return images.astype(jnp.float32) / 255


def embedder_step(
    state: TrainState, batch: Batch, *, context: StepContext, perturb: bool
) -> tuple[TrainState, Metrics]:
    """Trains F on 1/2 metric(F_0(x)) + 1/2 metric(F_1(h + delta)), or without `perturb` on
    metric(F_0(x)); with `train.consistency` also on the distance to F_0 of the clean image.

    With `optim.sam_radius`, the gradient is that at params + radius g / ||g|| (Foret et al. 2021,
    equation 2), with g the gradient at params; everything else is computed at params.

    If the metric loss has a memory, every term uses the memory from before the step, and only the
    clean descriptors update it, so an image enters it once.
    """
    config, params = context.config, _trained(state)
    gradient, found = _embedder_gradient(state, params, batch, context, perturb)
    gradient = parallel.pmean(gradient)
    if config.optim.sam_radius > 0:
        size = config.optim.sam_radius / (optax.tree.norm(gradient) + 1e-12)
        steepest = jax.tree.map(lambda p, g: p + size * g, params, gradient)
        gradient, _ = _embedder_gradient(state, steepest, batch, context, perturb)
        gradient = parallel.pmean(gradient)
    stats, metrics = found.stats, found.metrics
    if config.train.schedule == "joint" and config.adversarial.generated_views > 0:
        extra, stats, loss = _generated_views(state, batch, context, stats)
        gradient = jax.tree.map(jnp.add, gradient, parallel.pmean(extra))
        metrics = metrics | {"generated_metric_loss": loss}
    state, norms = _updated(state, context, gradient, stats)
    memory = {name: each.memory for name, each in found.loss_states.items()}
    state = state.replace(step=state.step + 1, loss_memory=memory)
    return state, parallel.pmean(metrics) | norms


class Passed(NamedTuple):
    """What the passes through F leave beside the gradient: batch statistics, states of the metric
    loss, metrics."""

    stats: PyTree
    loss_states: dict[str, State]
    metrics: Metrics


def _embedder_gradient(
    state: TrainState, params: PyTree, batch: Batch, context: StepContext, perturb: bool
) -> tuple[dict[str, PyTree], Passed]:
    """Gradient of the loss of F at `params` on one device.

    The lower part runs forward and backward once: the VJP of the clean upper part gives both the
    direction of the perturbation and the gradient of the clean term (A-FAN, Chen et al. 2021).
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

    def clean_loss(params: PyTree, mid: Array) -> tuple[Array, Any]:
        loss, (stats_after, blocks, states) = upper(params, mid, stats, "clean")
        distance = _distance_to_clean(params, batch, context, variables, blocks)
        # The clean term is halved with a perturbed one, and the distance is not.
        total = loss + (1 + perturb) * config.train.consistency * distance
        return total, (stats_after, blocks, states, loss, distance)

    mid, vjp_lower, stats = jax.vjp(lower, params["embedder"], has_aux=True)
    total, vjp_upper, (stats_after, blocks, states, clean, distance) = jax.vjp(
        clean_loss, params, mid, has_aux=True
    )
    gradient, cotangent = vjp_upper(jnp.ones_like(total))
    metrics = {"metric_loss": clean, **health.embedding(blocks["fused"], labels)}
    if config.train.consistency > 0:
        metrics["consistency_loss"] = distance
    if perturb:
        delta = _perturbation(config.adversarial, config.seed, state.step, mid, cotangent)
        perturbed, vjp_perturbed, (stats_after, *_) = jax.vjp(
            lambda p, h: upper(p, h, stats_after, "adversarial"), params, mid + delta, has_aux=True
        )
        both = (gradient, cotangent), vjp_perturbed(jnp.ones_like(perturbed))
        gradient, cotangent = jax.tree.map(lambda a, b: 0.5 * (a + b), *both)
        metrics["adversarial_metric_loss"] = perturbed
    own = jax.tree.map(jnp.add, gradient["embedder"], vjp_lower(cotangent)[0])
    return gradient | {"embedder": own}, Passed(stats_after, states, metrics)


def _distance_to_clean(
    params: PyTree, batch: Batch, context: StepContext, variables: PyTree, blocks: dict[str, Array]
) -> Float[Array, ""]:
    """mean 1 - F(x~) . F(x) of the fused descriptors of the global batch, without gradient through
    the clean images x; 0 if `train.consistency` is 0."""
    if context.config.train.consistency == 0:
        return jnp.zeros(())
    descriptors, _ = layers.apply(context.networks.embedder,
        variables | {"params": params["embedder"]}, to_unit(batch["clean"]), train=True,
        mutable=["batch_stats"],
    )  # fmt: skip
    target = jax.lax.stop_gradient(parallel.all_gather(named(descriptors))["fused"])
    return 1 - jnp.mean(jnp.sum(blocks["fused"] * target, axis=-1))


def _perturbation(
    config: AdversarialConfig, seed: int, step: Array, mid: Array, cotangent: Array
) -> Array:
    """Returns the perturbation of the mid map."""
    strength, direction = (
        parallel.sample_keys(stream(seed, name, step), len(mid))
        for name in ("perturbation", "direction")
    )
    draws = Draws(strength, direction, parallel.all_gather)
    perturb = PERTURBATIONS[config.perturbation]
    return perturb(mid, cotangent, draws, config.feature_epsilon)


def _trained(state: TrainState) -> dict[str, PyTree]:
    """Parameters trained by the metric loss: those of F, and its own if it has any."""
    return {
        name: state.variables[name]["params"] if name in state.variables else {}
        for name in ("embedder", "loss")
    }


def _updated(
    state: TrainState, context: StepContext, gradient: dict[str, PyTree], stats: PyTree
) -> tuple[TrainState, Metrics]:
    """Updates F, and the parameters of the loss if it has any."""
    decay, norms = context.config.optim.ema_decay, {}
    for name, batch_stats in {"embedder": stats, "loss": None}.items():
        if name in state.variables:
            state, norm = apply_gradients(
                state, context.optimisers[name], name, gradient[name], batch_stats, decay
            )
            norms |= norm
    return state, norms


def _metric(
    state: TrainState, context: StepContext, params: PyTree, descriptors: Descriptors,
    labels: Int[Array, "n"],
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict[str, State]]]:  # fmt: skip
    """Returns the metric loss of the global batch, its descriptors, and the next loss state."""
    proxies = layers.apply(
        context.networks.embedder, {"params": params["embedder"]}, method="proxies"
    )
    blocks = parallel.all_gather(named(descriptors))
    states = state.loss_states(params["loss"])
    # One key for all devices, because each computes the loss of the global batch.
    key = stream(context.config.seed, "metric_loss", state.step)
    loss, states = metric_loss(context.config.loss, states, blocks, labels, proxies, key)
    return loss, (blocks, states)


def _generated_views(
    state: TrainState, batch: Batch, context: StepContext, stats: PyTree
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    """Gradient, statistics and loss of restored images as training views, through the adversarial
    branch. G gets no gradient, because it is trained without labels."""
    images, labels = to_unit(batch["image"]), parallel.all_gather(batch["label"])
    networks = context.networks
    restored = jax.lax.stop_gradient(networks.restore(state.variables, images))

    def objective(params: PyTree) -> tuple[Array, Any]:
        descriptors, changed = networks.space.describe(networks.embedder,
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
    """Updates D, then G against the new D, with frozen F.

    G runs forward once; the losses of G and D use the same images. The decoder is also trained on
    the codes of clean images. No labels are used. If G replaces what D finds damaged, it gets the
    estimate of D from before the step, and D also learns which pixels are damaged.
    """
    networks, config = context.networks, context.config
    assert networks.generator is not None
    generator = networks.generator
    frozen = _frozen(state, config.train.schedule)
    clean, x = (
        networks.space.of(networks.embedder, frozen, to_unit(batch[name]))
        for name in ("clean", "image")
    )
    key = stream(config.seed, "adversarial", state.step)
    key_code, key_sample, key_augment = (
        parallel.sample_keys(k, len(clean)) for k in jax.random.split(key, 3)
    )

    found = networks.damage(state.variables, x)

    def noise(keys: Key[Array, "b"]) -> Float[Array, "b z"]:
        return jax.vmap(lambda k: jax.random.normal(k, (networks.latent_dim,)))(keys)

    def generate(params: PyTree) -> Generated:
        variables = {"params": params}
        mean, log_variance = layers.apply(generator, variables, clean, method="encode")
        code = mean + jnp.exp(0.5 * log_variance) * noise(key_code)
        z = jnp.concatenate([noise(key_sample), code])
        sampled, coded = jnp.split(layers.apply(generator, variables, z, method="sample"), 2)
        restored = layers.apply(generator, variables, x, found, method="restore")
        return Generated(restored, sampled, coded, adversarial.code_divergence(mean, log_variance))

    generated, vjp = jax.vjp(generate, state.variables["generator"]["params"])
    fakes = _fakes(context, clean, x, generated, batch["corruption"])
    damaged = Damaged(x, batch["damage"])
    state, d_metrics = _discriminator_update(state, context, clean, fakes, damaged, key_augment)
    cotangents, g_metrics = _generator_cotangents(
        state, context, frozen, clean, generated, key_augment
    )
    gradient = parallel.pmean(vjp(cotangents)[0])
    state, norm = apply_gradients(
        state, context.optimisers["generator"], "generator", gradient, None, config.optim.ema_decay
    )
    metrics = parallel.pmean(d_metrics | g_metrics) | norm
    kinds = 1 + len(config.data.corruptions)
    before, after, target = (
        networks.space.normalised(each, clean) for each in (x, generated.restored, clean)
    )
    metrics |= health.restoration(before, after, target, batch["corruption"], kinds)
    return state.replace(step=state.step + 1), metrics


def _frozen(state: TrainState, schedule: str) -> PyTree:
    """Variables of F for training G and D: the moving average, as in search, or in a joint schedule
    the current ones."""
    joint = schedule == "joint"
    return jax.lax.stop_gradient((state.variables if joint else state.average)["embedder"])


def _discriminator_update(
    state: TrainState, context: StepContext, clean: Array, fakes: list[Fake], damaged: Damaged,
    keys: Array,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates D: cross-entropy of real against fake images and of intact against damaged pixels,
    and lazy R1."""
    config, module = context.config.adversarial, context.networks.discriminator
    assert module is not None
    variables = state.variables["discriminator"]
    counted = jnp.concatenate([fake.counted for fake in fakes])
    weights = counted / jnp.maximum(parallel.pmean(counted.sum()), 1)

    def objective(params: PyTree) -> tuple[Array, Any]:
        def logits_of(images: Array, keys: Array) -> tuple[Array, PyTree]:
            out, changed = layers.apply(module,
                variables | {"params": params}, _augmented(context, images, keys), train=True,
                mutable=["batch_stats"],
            )  # fmt: skip
            return out.logit, changed.get("batch_stats", {})

        # One pass over all images; each group has the same augmentation.
        groups = [clean, *(fake.images for fake in fakes)]
        logits, stats = logits_of(jnp.concatenate(groups), jnp.concatenate([keys] * len(groups)))
        real, fake = logits[: len(clean)], logits[len(clean) :]
        loss = adversarial.discriminator_loss(real, fake, weights)
        penalty = jax.lax.cond(
            (config.r1 > 0) & (state.step % config.r1_every == 0),
            lambda: adversarial.r1_penalty(lambda x: logits_of(x, keys)[0], clean),
            lambda: jnp.zeros(()),
        )
        figures = {"discriminator_loss": loss, "r1": penalty * config.r1_every,
                   "d_real": real.mean(), "d_fake": jnp.sum(weights * fake)}  # fmt: skip
        if module.localise:
            pixels = _pixels(module, variables | {"params": params}, damaged.images)
            figures["d_pixels"] = adversarial.pixel_loss(pixels, damaged.damage)
            loss += adversarial.PIXELS * figures["d_pixels"]
        return loss + config.r1 * config.r1_every * penalty, (stats, figures)

    gradient, (stats, metrics) = jax.grad(objective, has_aux=True)(variables["params"])
    state, norm = apply_gradients(
        state, context.optimisers["discriminator"], "discriminator", parallel.pmean(gradient),
        parallel.pmean(stats), 0.0,
    )  # fmt: skip
    return state, metrics | norm


def _pixels(module: Discriminator, variables: PyTree, images: Array) -> Float[Array, "b h w"]:
    """D's logits of the pixels, without augmentation."""
    pixels = layers.apply(module, variables, images, train=False).pixels
    assert pixels is not None
    return pixels


def _fakes(
    context: StepContext, clean: Array, x: Array, generated: Generated, corruption: Array
) -> list[Fake]:
    """Returns the images that D is trained on as not real: those of G that its adversarial terms
    use, and with `discriminator.judges_views` the views among which it routes queries: the
    corrupted images, and median-filtered ones."""
    config = context.config
    every = jnp.ones(len(clean))
    wanted = {"restored": config.adversarial.lambda_adversarial > 0,
              "sampled": config.adversarial.lambda_noise > 0}  # fmt: skip
    fakes = [Fake(getattr(generated, name), every) for name, on in wanted.items() if on]
    if config.discriminator.judges_views:
        fakes.append(Fake(x, (corruption > 0).astype(jnp.float32)))
        if context.networks.space.images:
            fakes += [Fake(median(each), every) for each in (clean, x)]
    return fakes or [Fake(generated.restored, every)]


def _augmented(context: StepContext, x: Array, keys: Array) -> Array:
    """DiffAugment of images; mid maps are not augmented."""
    wanted = context.config.adversarial.diffaugment and context.networks.space.images
    return diffaugment(x, keys) if wanted else x


def _generator_cotangents(
    state: TrainState,
    context: StepContext,
    frozen: PyTree,
    clean: Array,
    generated: Generated,
    keys: Array,
) -> tuple[Generated, Metrics]:
    """Gradient of the loss of G with respect to its outputs:

    lambda_reconstruction reconstruction(x^, x) + lambda_adversarial softplus(-D(x^))
    + lambda_noise softplus(-D(G(z))) + lambda_features (1 - F(x^) . F(x)), summed over global and
    local descriptors, + lambda_code (reconstruction(G(code of x), x) + CODE_PRIOR divergence).
    """
    config, networks = context.config.adversarial, context.networks
    assert networks.discriminator is not None
    discriminator, space = networks.discriminator, networks.space

    def adversarial_term(images: Array) -> Array:
        output = layers.apply(
            discriminator, state.variables["discriminator"], _augmented(context, images, keys),
            train=False,
        )  # fmt: skip
        return adversarial.generator_loss(output.logit)

    def error(x: Array) -> Array:
        return adversarial.reconstruction(
            space.normalised(x, clean), space.normalised(clean, clean)
        )

    def objective(outputs: Generated) -> tuple[Array, Metrics]:
        def code() -> Array:
            return error(outputs.coded) + adversarial.CODE_PRIOR * outputs.divergence

        terms = {
            "g_reconstruction": (config.lambda_reconstruction, lambda: error(outputs.restored)),
            "g_adversarial": (
                config.lambda_adversarial, lambda: adversarial_term(outputs.restored)
            ),
            "g_features": (
                config.lambda_features, lambda: _distance(networks, frozen, outputs.restored, clean)
            ),
            "g_noise": (config.lambda_noise, lambda: adversarial_term(outputs.sampled)),
            "g_code": (config.lambda_code, code),
        }  # fmt: skip
        values = {name: term() for name, (weight, term) in terms.items() if weight > 0}
        total = sum((terms[name][0] * value for name, value in values.items()), jnp.zeros(()))
        return total, values | {"generator_loss": total}

    return jax.grad(objective, has_aux=True)(generated)


def _distance(networks: Networks, frozen: PyTree, x: Map, clean: Map) -> Float[Array, ""]:
    """mean 1 - F(x) . F(clean), summed over global and local descriptors."""
    found, target = (
        networks.space.describe(networks.embedder, frozen, each, train=False) for each in (x, clean)
    )
    distances = [
        1 - jnp.mean(jnp.sum(a * jax.lax.stop_gradient(b), -1))
        for a, b in zip(found, target, strict=True)
    ]
    return jnp.sum(jnp.stack(distances))


def joint_step(
    state: TrainState, batch: Batch, *, context: StepContext, perturb: bool
) -> tuple[TrainState, Metrics]:
    """Updates F, then D and G, on the same batch; counts as one step."""
    after, f_metrics = embedder_step(state, batch, context=context, perturb=perturb)
    after, g_metrics = generator_step(after.replace(step=state.step), batch, context=context)
    return after, f_metrics | g_metrics


def probe_step(
    state: TrainState, batch: Batch, *, context: StepContext
) -> tuple[TrainState, Metrics]:
    """Computes the more expensive metrics of G for log lines; returns the state unchanged."""
    networks, config = context.networks, context.config
    key = stream(config.seed, "probe", state.step)
    frozen, images = _frozen(state, config.train.schedule), to_unit(batch["image"])
    return state, health.snapshot(networks, state, frozen, images, batch["label"], key)
