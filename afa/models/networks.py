"""Every network of a run, built from its configuration, and what search computes with them."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from afa import parallel
from afa.config import ExperimentConfig
from afa.errors import UserError, choose
from afa.models import backbones, layers, views
from afa.models.backbones.contract import Options, Preprocessing
from afa.models.discriminator import Discriminator, Verdict
from afa.models.embedder import IMAGENET_CLASSES, Descriptors, Embedder, Images
from afa.models.freezing import Frozen
from afa.models.fusion import RestorationGate, shares
from afa.models.generator import Generator
from afa.models.heads import LocalFeatures


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules of one run; their variables live in `afa.train.state.TrainState`.

    Without the adversarial part `generator`, `discriminator` and `gate` are None.
    """

    embedder: Embedder
    generator: Generator | None
    discriminator: Discriminator | None
    gate: RestorationGate | None
    latent_dim: int
    view_names: tuple[str, ...]
    restored_branch: layers.Branch

    def init(self, key: Key[Array, ""], image_size: int) -> dict[str, PyTree]:
        """Fresh variables of every network: name -> {"params": ..., "batch_stats": ...}."""
        images = jnp.zeros((1, image_size, image_size, 3))
        z = jnp.zeros((1, self.latent_dim))
        names = ("embedder", "generator", "discriminator", "gate")
        keys = jax.random.split(key, len(names))

        def fresh(name: str, module: nn.Module | None, *args: Any, **kwargs: Any) -> PyTree:
            assert module is not None
            init = parallel.compiled_once(lambda k: module.init(k, *args, **kwargs))
            variables = init(keys[names.index(name)])
            return {each: variables.get(each, {}) for each in ("params", "batch_stats")}

        variables = {"embedder": fresh("embedder", self.embedder, images, train=True)}
        if self.generator is not None:
            unit, logit = jnp.zeros((1, self.embedder.embedding_dim)), jnp.zeros(1)
            variables |= {
                "generator": fresh("generator", self.generator, images, z),
                "discriminator": fresh("discriminator", self.discriminator, images, train=False),
                "gate": fresh("gate", self.gate, unit, unit, logit, logit),
            }
        return variables

    @property
    def gated(self) -> bool:
        """Whether an image has another vector as a query than in the gallery."""
        return self.gate is not None and self.gate.kind != "fixed"

    def block_names(self) -> tuple[str, ...]:
        """Every descriptor block there is for search."""
        game = () if self.generator is None else ("restored", "discriminator")
        original = ("imagenet",) if self.embedder.backbone.options.classes else ()
        return ("global", "local", "posterior", *original, *self.view_names, *game)

    def blocks(
        self,
        variables: Mapping[str, PyTree],
        images: Images,
        wanted: Collection[str] | None = None,
    ) -> tuple[dict[str, Float[Array, "b _"]], dict[str, Float[Array, "b"]]]:
        """Descriptor blocks of a batch for search, and their gates (`afa.models.fusion.shares`).

        Blocks: "global", "local", "posterior", with the published classifier "imagenet" (its own
        posterior), one a second view ("flip", ...), and with a generator "restored" (F of G(x)) and
        "discriminator" (D's features of x). The noise input of G is zero, so that an image has one
        descriptor. All views run through F as one batch.

        Args:
          wanted: names of the blocks to compute; None is all of them.
        """
        wanted = self.block_names() if wanted is None else wanted
        seen_as = {"global": images}
        seen_as |= {n: views.VIEWS[n](images) for n in self.view_names if n in wanted}
        if "restored" in wanted:
            seen_as["restored"] = self.restore(variables, images)
        described = self._described(variables, seen_as)
        blocks = {name: each.global_descriptor for name, each in described.items()}
        blocks["local"] = described["global"].local
        if "posterior" in wanted:
            posterior = layers.apply(
                self.embedder, variables["embedder"], blocks["global"], method="posterior"
            )
            blocks["posterior"] = layers.l2_normalise(posterior)
        if "imagenet" in wanted:
            logits = layers.apply(self.embedder, variables["embedder"], images, method="logits")
            blocks["imagenet"] = layers.l2_normalise(nn.softmax(logits.astype(jnp.float32)))
        gates = {}
        if self.discriminator is not None and "discriminator" in wanted:
            blocks["discriminator"] = self._verdict(variables, images).features
        if self.gate is not None and "restored" in wanted:
            # Both verdicts are dead code, and cost nothing, unless the gate asks for them.
            logits = [self._verdict(variables, each).logit
                      for each in (images, seen_as["restored"])]  # fmt: skip
            opened = layers.apply(
                self.gate, variables["gate"], blocks["global"], blocks["restored"], *logits
            )
            gates = shares(self.gate.kind, opened)
        return blocks, gates

    def pooled(
        self, variables: Mapping[str, PyTree], images: Images, wanted: Collection[str]
    ) -> dict[str, Float[Array, "b _"]]:
        """The blocks "global" and "local", and those of the wanted second views, of the backbone
        alone (`Embedder.pooled`): what its weights are worth without a trained head."""
        names = ["global", *(name for name in self.view_names if name in wanted)]
        seen_as = [images, *(views.VIEWS[name](images) for name in names[1:])]
        out = layers.apply(
            self.embedder, variables["embedder"], jnp.concatenate(seen_as), method="pooled"
        )
        global_descriptor, local = (jnp.split(each, len(names)) for each in out)
        return dict(zip(names, global_descriptor, strict=True)) | {"local": local[0]}

    def _described(
        self, variables: Mapping[str, PyTree], images: Mapping[str, Images]
    ) -> dict[str, Descriptors]:
        """Descriptors of several images of one batch, by one pass through F a branch."""
        found = {}
        for branch in ("clean", "adversarial"):
            names = [n for n in images if branch == self._branch(n)]
            if names:
                out = layers.apply(
                    self.embedder,
                    variables["embedder"],
                    jnp.concatenate([images[n] for n in names]),
                    train=False,
                    branch=branch,
                )
                global_descriptor, local = (jnp.split(each, len(names)) for each in out)
                found |= {
                    n: Descriptors(global_descriptor[i], local[i]) for i, n in enumerate(names)
                }
        return found

    def _branch(self, name: str) -> layers.Branch:
        return self.restored_branch if name == "restored" else "clean"

    def _verdict(self, variables: Mapping[str, PyTree], images: Images) -> Verdict:
        assert self.discriminator is not None
        return layers.apply(self.discriminator, variables["discriminator"], images, train=False)

    def local_features(
        self, variables: Mapping[str, PyTree], images: Images, count: int
    ) -> LocalFeatures:
        """The `count` strongest places of the local view of every image."""
        return layers.apply(
            self.embedder, variables["embedder"], images, count, method="local_features"
        )

    def restore(self, variables: Mapping[str, PyTree], images: Images) -> Images:
        """x^ = G(x, 0), clipped to [0, 1]."""
        if self.generator is None:
            raise ValueError("this run has no generator")
        z = jnp.zeros((images.shape[0], self.latent_dim))
        restored = layers.apply(self.generator, variables["generator"], images, z, method="restore")
        return jnp.clip(restored, 0, 1)


def dtype_of(precision: str) -> layers.Dtype:
    """Compute type: bfloat16 where the device is fast at it, unless told otherwise."""
    if precision == "auto":
        precision = "bfloat16" if parallel.accelerated() else "float32"
    return jnp.dtype(precision)


def build_backbone(config: ExperimentConfig) -> Any:
    """F's network alone.

    Raises:
      UserError: unknown backbone, or one that has no such stem, stage, or is too deep for so small
        images.
    """
    chosen, size = config.backbone, config.data.image_size
    options = Options(
        chosen.stem,
        dtype_of(config.train.precision),
        chosen.remat,
        IMAGENET_CLASSES if chosen.head == "imagenet" else 0,
    )
    module = backbones.build(chosen.name, options)
    smallest, multiple = (
        getattr(backbones.member(chosen.name), field) for field in ("smallest", "multiple")
    )
    if size < smallest or size % multiple:
        rule = f" and a multiple of {multiple}" if multiple > 1 else ""
        raise UserError(
            f"data.image_size={size}: {chosen.name} needs at least {smallest} pixels{rule}"
        )
    if not 0 <= chosen.frozen_stages <= len(module.STAGES):
        raise UserError(
            f"backbone.frozen_stages={chosen.frozen_stages}: {chosen.name} has "
            f"{len(module.STAGES)} stages"
        )
    return module


def frozen_parts(config: ExperimentConfig) -> Frozen:
    """What of F's network stays as it is."""
    return Frozen(config.backbone.frozen_stages, config.backbone.frozen_norm)


def expected_preprocessing(config: ExperimentConfig) -> Preprocessing:
    """What F expects of an image: as configured, else as the network's published weights do."""
    usual, chosen = backbones.member(config.backbone.name).preprocessing, config.backbone
    return Preprocessing(
        chosen.mean or usual.mean, chosen.std or usual.std, chosen.channels or usual.channels,
        usual.crop,
    )  # fmt: skip


def preprocessing_record(config: ExperimentConfig) -> dict[str, Any]:
    """What the network does to an image's values first; stored with an index."""
    expected = expected_preprocessing(config)
    return {
        "standardise": config.embedder.standardise,
        "mean": list(expected.mean),
        "std": list(expected.std),
        "channels": expected.channels,
    }


def build_networks(config: ExperimentConfig, classes: int) -> Networks:
    """All networks of an experiment with that many training classes.

    Raises:
      UserError: unknown view, or as `build_backbone`.
    """
    dtype = dtype_of(config.train.precision)
    for name in config.evaluation.views:
        choose("evaluation.views", name, views.VIEWS)
    adversarial = config.adversarial
    embedder = Embedder(
        build_backbone(config),
        config.embedder.embedding_dim,
        config.embedder.local_dim,
        classes,
        config.loss.posterior_temperature,
        config.embedder.gem_power,
        dtype,
        expected_preprocessing(config),
        config.embedder.standardise,
        frozen_parts(config),
    )
    if not (adversarial.enabled and adversarial.generator):
        generator = discriminator = gate = None
    else:
        g, d = config.generator, config.discriminator
        generator = Generator(g.width, g.levels, g.latent_dim, config.data.image_size, dtype)
        discriminator = Discriminator(d.width, d.levels, d.spectral_norm, dtype)
        gate = RestorationGate(adversarial.gate)
    joint = config.train.schedule == "joint" and adversarial.generated_views > 0
    return Networks(
        embedder, generator, discriminator, gate, config.generator.latent_dim,
        config.evaluation.views, "adversarial" if joint else "clean",
    )  # fmt: skip
