"""The networks of a run, built from its configuration, and the descriptors for search."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from afa import parallel
from afa.config import ExperimentConfig
from afa.errors import UserError, choose
from afa.models import backbones, generators, layers, routing, views
from afa.models.backbones.contract import Options, Preprocessing
from afa.models.discriminator import Discriminator, Verdict
from afa.models.embedder import IMAGENET_CLASSES, Descriptors, Embedder, Images
from afa.models.freezing import Frozen
from afa.models.fusion import Fusion, Role, Route, fuse
from afa.models.heads import LocalFeatures
from afa.models.spaces import IMAGES, Map, Space


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules of one run; their variables are in `afa.train.state.TrainState`.

    Without the adversarial part, `generator` and `discriminator` are None.
    """

    embedder: Embedder
    generator: nn.Module | None
    discriminator: Discriminator | None
    latent_dim: int
    view_names: tuple[str, ...]
    restored_branch: layers.Branch

    def init(self, key: Key[Array, ""], image_size: int) -> dict[str, PyTree]:
        """Initialises all networks: name -> {"params": ..., "batch_stats": ...}."""
        images = jnp.zeros((1, image_size, image_size, 3))
        z = jnp.zeros((1, self.latent_dim))
        names = ("embedder", "generator", "discriminator")
        keys = jax.random.split(key, len(names))

        def initialise(name: str, module: nn.Module | None, *args: Any, **kwargs: Any) -> PyTree:
            assert module is not None
            init = parallel.compiled_once(lambda k: module.init(k, *args, **kwargs))
            variables = init(keys[names.index(name)])
            return {each: variables.get(each, {}) for each in ("params", "batch_stats")}

        variables = {"embedder": initialise("embedder", self.embedder, images, train=True)}
        if self.generator is not None:
            x = jnp.zeros((1, *self.space.shape(self.embedder, image_size)))
            variables |= {
                "generator": initialise("generator", self.generator, x, z),
                "discriminator": initialise("discriminator", self.discriminator, x, train=False),
            }
        return variables

    @property
    def space(self) -> Space:
        """The space of G and D; images without them."""
        return IMAGES if self.discriminator is None else self.discriminator.space

    def block_names(self) -> tuple[str, ...]:
        """Returns the names of all descriptor blocks for search."""
        adversarial = () if self.generator is None else ("restored", "discriminator")
        original = ("imagenet",) if self.embedder.backbone.options.classes else ()
        return ("global", "local", "posterior", *original, *self.view_names, *adversarial)

    def candidates(self) -> tuple[str, ...]:
        """Returns the names of the views among which a query can be routed.

        G(x) is one of them if G restores images and F describes them like others.
        """
        restorable = self.generator is not None and self._restored_path == (IMAGES, "clean")
        restored = (routing.RESTORED,) if restorable else ()
        filters = tuple(name for name in self.view_names if name in views.FILTERS)
        return (routing.ORIGINAL, *filters, *restored)

    def judges(self) -> tuple[str, ...]:
        """Returns the names of the judges; those of D only if it sees images, or localises."""
        module = self.discriminator
        able = {"discriminator": module is not None and self.space.images,
                "damage": module is not None and module.localise}  # fmt: skip
        return tuple(name for name in routing.JUDGES if able.get(name, True))

    def vectors(
        self,
        variables: Mapping[str, PyTree],
        images: Images,
        fusion: Fusion,
        role: Role = "query",
    ) -> Float[Array, "b d"]:
        """Computes the fused unit vectors of a batch, as search does.

        Args:
          variables: network name -> variables.
          images: images in [0, 1].
          fusion: weights of the blocks, and the route of queries.
          role: a gallery image is not routed.
        """
        routed = images
        if fusion.route is not None and role == "query":
            routed = self.routed(variables, images, fusion.route)
        return fuse(self.blocks(variables, images, fusion.blocks, routed), dict(fusion.weights))

    def routed(self, variables: Mapping[str, PyTree], images: Images, route: Route) -> Images:
        """Returns the view of each query that F describes."""
        found = self.views(variables, images, route.views)
        if len(found) == 1:
            return found[route.views[0]]
        asked = {routing.ORIGINAL: images} | found

        def posteriors() -> dict[str, Array]:
            return {name: self._posterior(variables, each.global_descriptor)
                    for name, each in self._describe(variables, asked).items()}  # fmt: skip

        judge = choose("judge of the route", route.judge, routing.JUDGES)
        scores = judge(self._judged(variables, asked, posteriors))
        return routing.pick(routing.chosen(scores, route.offsets), list(found.values()))

    def _judged(
        self,
        variables: Mapping[str, PyTree],
        images: Mapping[str, Images],
        posteriors: Callable[[], Mapping[str, Array]],
    ) -> routing.Views:
        return routing.Views(
            images,
            lambda x: self.discriminate(variables, x).logit,
            posteriors,
            lambda x: self.damage(variables, x),
        )

    def views(
        self, variables: Mapping[str, PyTree], images: Images, names: Collection[str]
    ) -> dict[str, Images]:
        """Computes views of images by name: the original, second views, G(x)."""
        special = {
            routing.ORIGINAL: lambda: images,
            routing.RESTORED: lambda: self.restore(variables, images),
        }
        return {
            name: special[name]() if name in special else views.VIEWS[name](images)
            for name in names
        }

    def blocks(
        self,
        variables: Mapping[str, PyTree],
        images: Images,
        wanted: Collection[str] | None = None,
        routed: Images | None = None,
    ) -> dict[str, Float[Array, "b _"]]:
        """Computes the descriptor blocks of a batch.

        Blocks: "global", "local", "posterior"; with the published classifier, "imagenet" (its
        posterior); one per second view ("flip", ...); with a generator, "restored" (F of G(x)) and
        "discriminator" (features of D). All views pass through F as one batch.

        Args:
          variables: network name -> variables.
          images: images in [0, 1].
          wanted: names of the blocks to compute; None for all.
          routed: the images that "global", "local" and "posterior" describe; None: `images`.

        Returns:
          Block name -> unit descriptors.
        """
        wanted = self.block_names() if wanted is None else wanted
        inputs = self._inputs(variables, images, wanted)
        if routed is not None:
            inputs["global"] = routed
        return self._blocks(variables, images, wanted, self._embed(variables, inputs))

    def everything(
        self, variables: Mapping[str, PyTree], images: Images
    ) -> tuple[dict[str, Array], dict[str, dict[str, Array]], dict[str, dict[str, Array]]]:
        """Computes all blocks of a batch, and what the choice of a route needs.

        Returns:
          Block -> unit descriptors; candidate view -> its blocks "global", "local" and
          "posterior"; judge -> candidate view -> score.
        """
        inputs = self._inputs(variables, images, self.block_names())
        descriptors = self._embed(variables, inputs)
        blocks = self._blocks(variables, images, self.block_names(), descriptors)
        names = {view: "global" if view == routing.ORIGINAL else view for view in self.candidates()}
        posteriors = {
            view: self._posterior(variables, descriptors[name].global_descriptor)
            for view, name in names.items()
        }
        candidates = {
            view: {
                "global": descriptors[name].global_descriptor,
                "local": descriptors[name].local,
                "posterior": layers.l2_normalise(posteriors[view]),
            }
            for view, name in names.items()
        }
        judged = self._judged(
            variables, {view: inputs[name] for view, name in names.items()}, lambda: posteriors
        )
        scores = {name: routing.JUDGES[name](judged) for name in self.judges()}
        return blocks, candidates, scores

    def _inputs(
        self, variables: Mapping[str, PyTree], images: Images, wanted: Collection[str]
    ) -> dict[str, Map]:
        """The input of F behind each wanted block that has one of its own."""
        inputs: dict[str, Map] = {"global": images}
        inputs |= {n: views.VIEWS[n](images) for n in self.view_names if n in wanted}
        if "restored" in wanted:
            inputs["restored"] = self.restore(variables, images)
        return inputs

    def _blocks(
        self,
        variables: Mapping[str, PyTree],
        images: Images,
        wanted: Collection[str],
        descriptors: Mapping[str, Descriptors],
    ) -> dict[str, Float[Array, "b _"]]:
        """The wanted blocks, from the descriptors of the inputs."""
        blocks = {name: each.global_descriptor for name, each in descriptors.items()}
        blocks["local"] = descriptors["global"].local
        if "posterior" in wanted:
            posterior = self._posterior(variables, blocks["global"])
            blocks["posterior"] = layers.l2_normalise(posterior)
        if "imagenet" in wanted:
            logits = layers.apply(self.embedder, variables["embedder"], images, method="logits")
            blocks["imagenet"] = layers.l2_normalise(nn.softmax(logits.astype(jnp.float32)))
        if self.discriminator is not None and "discriminator" in wanted:
            x = self.space.of(self.embedder, variables["embedder"], images)
            blocks["discriminator"] = self.discriminate(variables, x).features
        return blocks

    def _posterior(
        self, variables: Mapping[str, PyTree], global_descriptor: Float[Array, "b d"]
    ) -> Float[Array, "b c"]:
        """Class posterior of global descriptors."""
        return layers.apply(
            self.embedder, variables["embedder"], global_descriptor, method="posterior"
        )

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
        """Computes descriptors of several views of a batch; the restored view has the space of G,
        and a branch of F of its own if F was trained on it."""
        if "restored" not in images or self._restored_path == (IMAGES, "clean"):
            return self._describe(variables, images)
        others = {name: each for name, each in images.items() if name != "restored"}
        restored = {"restored": images["restored"]}
        own = self._describe(variables, restored, *self._restored_path)
        return self._describe(variables, others) | own

    @property
    def _restored_path(self) -> tuple[Space, layers.Branch]:
        """Space of the restored view, and the branch of F that describes it."""
        return self.space, self.restored_branch

    def _describe(
        self,
        variables: Mapping[str, PyTree],
        images: Mapping[str, Map],
        space: Space = IMAGES,
        branch: layers.Branch = "clean",
    ) -> dict[str, Descriptors]:
        """Computes descriptors of several views of a batch in one pass through F."""
        out = space.describe(
            self.embedder,
            variables["embedder"],
            jnp.concatenate(list(images.values())),
            train=False,
            branch=branch,
        )
        parts = [jnp.split(each, len(images)) for each in out]
        return {name: Descriptors(*each) for name, each in zip(images, zip(*parts, strict=True),
                                                               strict=True)}  # fmt: skip

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
        """Computes x^ = G(x, damage) in the space of G: images in [0, 1], or mid maps of F."""
        if self.generator is None:
            raise ValueError("this run has no generator")
        x = self.space.of(self.embedder, variables["embedder"], images)
        return self.restore_point(variables, x)

    def restore_point(self, variables: Mapping[str, PyTree], x: Map) -> Map:
        """Computes x^ of points x of the space of G."""
        damage = self.damage(variables, x)
        return layers.apply(self.generator, variables["generator"], x, damage, method="restore")

    def damage(self, variables: Mapping[str, PyTree], x: Map) -> Float[Array, "b y x"]:
        """The probability, by D, that a pixel is not real; 0 if D does not localise."""
        if self.discriminator is None or not self.discriminator.localise:
            return jnp.zeros(x.shape[:-1])
        pixels = self.discriminate(variables, x).pixels
        assert pixels is not None
        return nn.sigmoid(-pixels)


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
        generator = discriminator = None
    else:
        d = config.discriminator
        generator, space = generators.build(
            config.generator, embedder, config.data.image_size, dtype
        )
        localise = config.generator.name in generators.LOCALISED
        discriminator = Discriminator(d.width, d.levels, d.spectral_norm, dtype, space, localise)
    joint = config.train.schedule == "joint" and adversarial.generated_views > 0
    return Networks(
        embedder, generator, discriminator, config.generator.latent_dim,
        config.evaluation.views, "adversarial" if joint else "clean",
    )  # fmt: skip
