"""The step of G and D on one device, compared with gradients of explicit losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from arrays import apply
from arrays import near_tree as near
from step_cases import STEP, equal, key_of, made, row_keys

from afa import parallel
from afa.losses import adversarial
from afa.models.discriminator import diffaugment
from afa.models.views import median
from afa.train import steps

KINDS = ("inpainting", "residual")  # with and without a discriminator that localises


def noise_of(dimension, keys):
    return jnp.stack([jax.random.normal(key, (dimension,)) for key in keys])


def cross_entropy(logits, real):
    """Of the probability `sigmoid(logits)` that pixels are real."""
    return -jnp.where(real, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits))


class Explicit:
    """The losses of D and G, differentiated separately. G is trained against the discriminator of
    `after`, and gets the damage that the discriminator of `state` finds."""

    def __init__(self, context, state, after, batch):
        self.context, self.chosen = context, context.config.adversarial
        self.networks, self.state, self.after = context.networks, state, after
        self.clean, self.images = (jnp.asarray(batch[each]) / 255 for each in ("clean", "image"))
        self.damage, self.corruption = (jnp.asarray(batch[n]) for n in ("damage", "corruption"))
        split = jax.random.split(key_of(context.config, "adversarial", STEP), 3)
        self.keys = [row_keys(key, len(self.clean)) for key in split]
        self.localise = context.config.generator.name == "inpainting"
        self.restored, self.sampled, _, _ = self.generate(state.variables["generator"]["params"])

    def generate(self, params):
        code, sample, _ = self.keys
        forward = functools.partial(apply, self.networks.generator, {"params": params})
        noise = functools.partial(noise_of, self.networks.latent_dim)
        mean, log_variance = forward(self.clean, method="encode")
        coded = forward(mean + jnp.exp(log_variance / 2) * noise(code), method="sample")
        divergence = (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(1).mean() / 2
        found = jnp.zeros(self.images.shape[:-1])
        if self.localise:
            judge = self.state.variables["discriminator"]["params"]
            found = 1 - jax.nn.sigmoid(self.pixels(judge, self.images))
        restored = forward(self.images, found, method="restore")
        return restored, forward(noise(sample), method="sample"), coded, divergence

    def logit(self, params, images):
        module, seen = self.networks.discriminator, diffaugment(images, self.keys[2])
        return apply(module, {"params": params}, seen, train=True).logit

    def pixels(self, params, images):
        """Not augmented, so that they lie where the damage does."""
        module = self.networks.discriminator
        return apply(module, {"params": params}, images, train=True).pixels

    def of_discriminator(self, params):
        fakes = (self.restored, self.sampled, median(self.clean), median(self.images))
        corrupted = self.corruption > 0
        wrong = sum(jax.nn.softplus(self.logit(params, each)).sum() for each in fakes)
        # Of the inputs of G, only the corrupted ones are not real.
        wrong += jnp.where(corrupted, jax.nn.softplus(self.logit(params, self.images)), 0).sum()
        wrong /= len(fakes) * len(self.images) + corrupted.sum()
        loss = jax.nn.softplus(-self.logit(params, self.clean)).mean() + wrong
        penalty = adversarial.r1_penalty(lambda x: self.logit(params, x), self.clean)
        of_pixels = jnp.zeros(())
        if self.localise:
            of_pixels = cross_entropy(self.pixels(params, self.images), ~self.damage).mean()
        total = loss + 4 * of_pixels + self.chosen.r1 * self.chosen.r1_every * penalty
        return total, {"discriminator_loss": loss, "r1": penalty * 4, "d_pixels": of_pixels}

    def error(self, found):
        return jnp.sqrt(jnp.square(found - self.clean).mean((1, 2, 3)) + 1e-4).mean()

    def of_generator(self, params):
        chosen, (restored, sampled, coded, divergence) = self.chosen, self.generate(params)
        judge = self.after.variables["discriminator"]["params"]
        found, target = (
            apply(self.networks.embedder, self.state.average["embedder"], each, train=False)
            for each in (restored, self.clean)
        )
        distance = sum(jnp.mean(1 - jnp.sum(a * b, 1)) for a, b in zip(found, target, strict=True))
        real, drawn = (jax.nn.softplus(-self.logit(judge, each)).mean()
                       for each in (restored, sampled))  # fmt: skip
        code = self.error(coded) + adversarial.CODE_PRIOR * divergence
        total = (
            chosen.lambda_reconstruction * self.error(restored) + chosen.lambda_code * code
            + chosen.lambda_adversarial * real + chosen.lambda_noise * drawn
            + chosen.lambda_features * distance
        )  # fmt: skip
        return total, {"generator_loss": total, "g_adversarial": real}


def explicit(context, state, after, batch):
    """Gradients of D and G, and the metrics."""
    made = Explicit(context, state, after, batch)
    variables = state.variables
    of_d, figures = jax.grad(made.of_discriminator, has_aux=True)(
        variables["discriminator"]["params"]
    )
    of_g, others = jax.grad(made.of_generator, has_aux=True)(variables["generator"]["params"])
    return of_d, of_g, figures | others


@pytest.mark.parametrize("kind", KINDS)
def test_generator_step_has_the_gradients_of_the_explicit_losses(kind):
    context, state, step = made("adversarial", generator__name=kind)
    batch = tiny.batch()
    after, metrics = step(state, batch)
    of_discriminator, of_generator, figures = parallel.compiled_once(
        functools.partial(explicit, context)
    )(state, after, batch)
    near(after.opt_state["discriminator"], of_discriminator, 1e-4)
    near(after.opt_state["generator"], of_generator, 1e-4)
    assert ("d_pixels" in metrics) == (kind == "inpainting")
    if kind == "residual":
        assert figures.pop("d_pixels") == 0
    for name, value in figures.items():
        exact = name in ("discriminator_loss", "d_pixels")
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5 if exact else 1e-4, err_msg=name)
    near(
        after.variables["discriminator"]["params"],
        jax.tree.map(
            lambda p, g: p - 0.01 * g,
            state.variables["discriminator"]["params"],
            of_discriminator,
        ),
        1e-4,
    )


def test_the_penalty_is_lazy():
    _, state, step = made("adversarial")
    batch = tiny.batch()
    figures = [
        float(step(state.replace(step=jnp.asarray(i, jnp.int32)), batch)[1]["r1"]) for i in range(6)
    ]
    assert figures[0] > 0
    assert figures[4] > 0
    assert figures[1] == figures[2] == figures[3] == figures[5] == 0


def test_generator_step_does_not_change_the_embedder():
    _, state, step = made("adversarial")
    after, _ = step(state, tiny.batch())
    assert equal(after.variables["embedder"], state.variables["embedder"])
    assert equal(after.opt_state["embedder"], state.opt_state["embedder"])
    assert equal(after.average["embedder"], state.average["embedder"])
    assert int(after.step) == STEP + 1


def test_labels_do_not_reach_the_generator_and_discriminator():
    _, state, step = made("adversarial")
    batch = tiny.batch()
    relabelled = batch | {"label": (batch["label"][::-1] + 1).astype(np.int32) % tiny.CLASSES}
    one, other = step(state, batch)[0], step(state, relabelled)[0]
    for each in ("generator", "discriminator"):
        assert equal(one.opt_state[each], other.opt_state[each])
        assert equal(one.variables[each], other.variables[each])


def test_discriminator_that_judges_no_views_sees_only_images_of_the_generator():
    batch, found = tiny.batch(), {}
    for judges in (False, True):
        _, state, step = made("adversarial", discriminator__judges_views=judges)
        after, metrics = step(state, batch)
        found[judges] = after.opt_state["discriminator"], metrics["discriminator_loss"]
    assert not equal(found[False], found[True])


@pytest.mark.parametrize(
    ("off", "metric"),
    [("lambda_reconstruction", "g_reconstruction"), ("lambda_adversarial", "g_adversarial"),
     ("lambda_features", "g_features"), ("lambda_noise", "g_noise"),
     ("lambda_code", "g_code")],
)  # fmt: skip
def test_a_term_of_weight_zero_is_not_computed(off, metric):
    context = tiny.context(tiny.config(**{f"adversarial.{off}": 0.0}))
    _, metrics = jax.eval_shape(
        functools.partial(steps.generator_step, context=context), tiny.state(context), tiny.batch()
    )
    terms = {name for name in metrics if name.startswith("g_")}
    assert terms == {"g_reconstruction", "g_adversarial", "g_features", "g_noise", "g_code"} - {
        metric
    }


def test_a_few_steps_find_the_damage_and_fill_it():
    """Both losses fall, on a batch whose damage is a grey square."""
    own = {name: optax.adam(5e-3) for name in ("generator", "discriminator")}
    context = tiny.context(tiny.config(**{"generator.name": "inpainting"}), own)
    step = parallel.compiled_once(functools.partial(steps.generator_step, context=context))
    state, batch = tiny.state(context), tiny.batch()
    found = []
    for _ in range(60):
        state, metrics = step(state, batch)
        found.append(metrics)
    for name, share in (("d_pixels", 0.5), ("g_reconstruction", 0.8)):
        assert found[-1][name] < share * found[0][name], name
    images = jnp.asarray(batch["image"] / 255, jnp.float32)
    estimate = np.asarray(context.networks.damage(state.variables, images))
    assert estimate[batch["damage"]].mean() > 3 * estimate[~batch["damage"]].mean()


def test_restoration_is_counted_for_every_corruption():
    _, state, step = made("adversarial")
    batch = tiny.batch()
    _, metrics = step(state, batch)
    np.testing.assert_array_equal(metrics["psnr_count"], [8, 8, 0, 0, 0])
    exact = batch["corruption"] == 0
    for rows, kind in ((exact, 0), (~exact, 1)):
        clean, image = (batch[each][rows] / 255 for each in ("clean", "image"))
        psnr = -10 * np.log10(np.mean(np.square(clean - image), axis=(1, 2, 3)) + 1e-6)
        np.testing.assert_allclose(metrics["psnr_in"][kind], psnr.sum(), rtol=1e-5)
