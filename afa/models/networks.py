"""The networks of a run, built from its configuration, and the descriptors for search."""

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
from afa.models import backbones, generators, layers, views
from afa.models.backbones.contract import Options, Preprocessing
from afa.models.discriminator import Discriminator, Verdict
from afa.models.embedder import IMAGENET_CLASSES, Descriptors, Embedder, Images
from afa.models.freezing import Frozen
from afa.models.fusion import RestorationGate, shares
from afa.models.heads import LocalFeatures
from afa.models.spaces import IMAGES, Map, Space


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules of one run; their variables are in `afa.train.state.TrainState`.

    Without the adversarial part, `generator`, `discriminator` and `gate` are None.
    """

    embedder: Embedder
    generator: nn.Module | None
    discriminator: Discriminator | None
    gate: RestorationGate | None
    latent_dim: int
    view_names: tuple[str, ...]
    restored_branch: layers.Branch

    def init(self, key: Key[Array, ""], image_size: int) -> dict[str, PyTree]:
        """Initialises all networks: name -> {"params": ..., "batch_stats": ...}."""
        images = jnp.zeros((1, image_size, image_size, 3))
        z = jnp.zeros((1, self.latent_dim))
        names = ("embedder", "generator", "discriminator", "gate")
        keys = jax.random.split(key, len(names))

        def initialise(name: str, module: nn.Module | None, *args: Any, **kwargs: Any) -> PyTree:
            assert module is not None
            init = parallel.compiled_once(lambda k: module.init(k, *args, **kwargs))
            variables = init(keys[names.index(name)])
            return {each: variables.get(each, {}) for each in ("params", "batch_stats")}

        variables = {"embedder": initialise("embedder", self.embedder, images, train=True)}
        if self.generator is not None:
            unit, logit = jnp.zeros((1, self.embedder.embedding_dim)), jnp.zeros(1)
            x = jnp.zeros((1, *self.space.shape(self.embedder, image_size)))
            variables |= {
                "generator": initialise("generator", self.generator, x, z),
                "discriminator": initialise("discriminator", self.discriminator, x, train=False),
                "gate": initialise("gate", self.gate, unit, unit, logit, logit),
            }
        return variables

    @property
    def space(self) -> Space:
        """The space of G and D; images without them."""
        return IMAGES if self.discriminator is None else self.discriminator.space

    @property
    def gated(self) -> bool:
        """Whether an image has another vector as a query than in the gallery."""
        return self.gate is not None and self.gate.kind != "fixed"

    def block_names(self) -> tuple[str, ...]:
        """Returns the names of all descriptor blocks for search."""
        adversarial = () if self.generator is None else ("restored", "discriminator")
        original = ("imagenet",) if self.embedder.backbone.options.classes else ()
        return ("global", "local", "posterior", *original, *self.view_names, *adversarial)

    def blocks(
        self,
        variables: Mapping[str, PyTree],
        images: Images,
        wanted: Collection[str] | None = None,
    ) -> tuple[dict[str, Float[Array, "b _"]], dict[str, Float[Array, "b"]]]:
        """Computes the descriptor blocks of a batch and their gates (`afa.models.fusion.shares`).

        Blocks: "global", "local", "posterior"; with the published classifier, "imagenet" (its
        posterior); one per second view ("flip", ...); with a generator, "restored" (F of G(x)) and
        "discriminator" (features of D). All views pass through F as one batch.

        Args:
          variables: network name -> variables.
          images: images in [0, 1].
          wanted: names of the blocks to compute; None for all.

        Returns:
          Block name -> unit descriptors, and block name -> gate of each image.
        """
        wanted = self.block_names() if wanted is None else wanted
        inputs: dict[str, Map] = {"global": images}
        inputs |= {n: views.VIEWS[n](images) for n in self.view_names if n in wanted}
        if "restored" in wanted:
            inputs["restored"] = self.restore(variables, images)
        descriptors = self._embed(variables, inputs)
        blocks = {name: each.global_descriptor for name, each in descriptors.items()}
        blocks["local"] = descriptors["global"].local
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
            x = self.space.of(self.embedder, variables["embedder"], images)
            blocks["discriminator"] = self.discriminate(variables, x).features
        if self.gate is not None and "restored" in wanted:
            # XLA removes both logits as dead code unless the gate uses them.
            x = self.space.of(self.embedder, variables["embedder"], images)
            logits = [self.discriminate(variables, each).logit
                      for each in (x, inputs["restored"])]  # fmt: skip
            opened = layers.apply(
                self.gate, variables["gate"], blocks["global"], blocks["restored"], *logits
            )
            gates = shares(self.gate.kind, opened)
        return blocks, gates

    def pooled(
        self, variables: Mapping[str, PyTree], images: Images, wanted: Collection[str]
    ) -> dict[str, Float[Array, "b _"]]:
        """Computes the blocks "global", "local" and those of the wanted second views without heads
        (`Embedder.pooled`), as a baseline for the weights of the backbone."""
        names = ["global", *(name for name in self.view_names if name in wanted)]
        inputs = [images, *(views.VIEWS[name](images) for name in names[1:])]
        out = layers.apply(
            self.embedder, variables["embedder"], jnp.concatenate(inputs), method="pooled"
        )
        global_descriptor, local = (jnp.split(each, len(names)) for each in out)
        return dict(zip(names, global_descriptor, strict=True)) | {"local": local[0]}

    def _embed(
        self, variables: Mapping[str, PyTree], images: Mapping[str, Map]
    ) -> dict[str, Descriptors]:
        """Computes descriptors of several views of a batch, with one pass through F per branch and
        space."""
        found = {}
        for space, branch in dict.fromkeys(map(self._path, images)):
            names = [n for n in images if (space, branch) == self._path(n)]
            out = space.describe(
                self.embedder,
                variables["embedder"],
                jnp.concatenate([images[n] for n in names]),
                train=False,
                branch=branch,
            )
            global_descriptor, local = (jnp.split(each, len(names)) for each in out)
            found |= {n: Descriptors(global_descriptor[i], local[i]) for i, n in enumerate(names)}
        return found

    def _path(self, name: str) -> tuple[Space, layers.Branch]:
        """Returns the space of a view, and the branch of F that describes it."""
        return (self.space, self.restored_branch) if name == "restored" else (IMAGES, "clean")

    def discriminate(self, variables: Mapping[str, PyTree], x: Map) -> Verdict:
        """Applies D to points of its space."""
        assert self.discriminator is not None
        return layers.apply(self.discriminator, variables["discriminator"], x, train=False)

    def local_features(
        self, variables: Mapping[str, PyTree], images: Images, count: int
    ) -> LocalFeatures:
        """Computes the `count` strongest local features of each image."""
        return layers.apply(
            self.embedder, variables["embedder"], images, count, method="local_features"
        )

    def restore(self, variables: Mapping[str, PyTree], images: Images) -> Map:
        """Computes x^ = G(x) in the space of G: images in [0, 1], or mid maps of F."""
        if self.generator is None:
            raise ValueError("this run has no generator")
        x = self.space.of(self.embedder, variables["embedder"], images)
        return layers.apply(self.generator, variables["generator"], x, method="restore")


def dtype_of(precision: str) -> layers.Dtype:
    """Returns the compute type; "auto" is bfloat16 on accelerators and float32 on CPUs."""
    if precision == "auto":
        precision = "bfloat16" if parallel.accelerated() else "float32"
    return jnp.dtype(precision)


def build_backbone(config: ExperimentConfig) -> Any:
    """Builds the backbone of F.

    Raises:
      UserError: unknown backbone, a stem or number of stages that it does not have, or an image
        size that it does not support.
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
    """Returns which parts of the backbone are frozen."""
    return Frozen(config.backbone.frozen_stages, config.backbone.frozen_norm)


def expected_preprocessing(config: ExperimentConfig) -> Preprocessing:
    """Returns the preprocessing of F: as configured, by default that of the published weights."""
    default, chosen = backbones.member(config.backbone.name).preprocessing, config.backbone
    return Preprocessing(
        chosen.mean or default.mean, chosen.std or default.std, chosen.channels or default.channels,
        default.crop,
    )  # fmt: skip


def preprocessing_record(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the normalisation of pixel values as a dictionary; stored with an index."""
    expected = expected_preprocessing(config)
    return {
        "standardise": config.embedder.standardise,
        "mean": list(expected.mean),
        "std": list(expected.std),
        "channels": expected.channels,
    }


def build_networks(config: ExperimentConfig, classes: int) -> Networks:
    """Builds all networks of an experiment.

    Args:
      classes: number of training classes.

    Raises:
      UserError: unknown view or generator, or as `build_backbone`.
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
        d = config.discriminator
        generator, space = generators.build(
            config.generator, embedder, config.data.image_size, dtype
        )
        discriminator = Discriminator(d.width, d.levels, d.spectral_norm, dtype, space)
        gate = RestorationGate(adversarial.gate)
    joint = config.train.schedule == "joint" and adversarial.generated_views > 0
    return Networks(
        embedder, generator, discriminator, gate, config.generator.latent_dim,
        config.evaluation.views, "adversarial" if joint else "clean",
    )  # fmt: skip
