"""Every setting of a run: nested frozen dataclasses, read by `python -m experiments.run`.

The text under a field is what `--help` shows. A duration is a string: "500" steps, "20ep" epochs
of the training images, or "40%" of the whole it belongs to.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal

from afa import losses
from afa.bounds import bounded, duration
from afa.errors import UserError, nearest
from afa.losses.base import Loss
from afa.losses.norm_softmax import NormSoftmax

TRAINED_CORRUPTIONS = ("gaussian_noise", "gaussian_blur", "occlusion", "low_resolution")
MOST_SEED = 2**32 - 1  # of JAX and NumPy alike

RANDOM = "random"  # what `backbone.weights` says of a network without published weights
# What a recipe sets for published weights, and training from scratch does without.
FINE_TUNING = ("backbone.frozen_norm", "optim.backbone_rate", "optim.head_warmup")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = "synthetic"
    """Data set: synthetic, folder, inshop, gldv2, or tfds:NAME."""
    path: str = ""
    """folder: the directory of class folders; inshop, gldv2: the one that holds their lists; tfds:
    the data_dir (empty: the TFDS default)."""
    cache: str = ""
    """Where the synthetic set is built (empty: ~/.cache/afa, or afa-cache-UID in the directory for
    temporary files where that cannot be written)."""
    image_size: int = bounded(224, above=0)
    """Side of the square images the networks see, in pixels."""
    crop_fraction: float = bounded(1.0, above=0, most=1)
    """Evaluation: the shorter side becomes image_size / crop_fraction, then a centre crop."""
    batch_size: int = bounded(64, above=0)
    """Images a step, over all devices."""
    sampler: Literal["pk", "shuffle"] = "pk"
    """pk: batch_size / images_per_class classes with images_per_class images each; shuffle."""
    images_per_class: int = bounded(4, above=0)
    """K of the pk sampler."""
    validation_fraction: float = bounded(0.2, least=0, most=1)
    """Share of the training classes held out as validation classes."""
    folds: int = bounded(0, least=0)
    """Cross-validation: the training classes are divided in so many parts, of which one validates;
    test classes stay as they are. 0: off, validation_fraction decides."""
    fold: int = bounded(0, least=0)
    """The part that validates, 0 to folds - 1: one run each."""
    split_seed: int = bounded(0, least=0, most=MOST_SEED)
    """Chooses the validation classes, or divides the training classes in folds."""
    objects: int = bounded(160, above=0)
    """Synthetic set: number of objects."""
    views: int = bounded(20, above=0)
    """Synthetic set: in-the-wild views of each object, beside one catalogue view."""
    render_size: int = bounded(96, above=0)
    """Synthetic set: side of the rendered images, in pixels."""
    crop_scale: float = bounded(0.6, above=0, most=1)
    """Training: smallest share of the area a random crop keeps."""
    flip: bool = True
    """Training: mirror half of the images."""
    jitter: float = bounded(0.2, least=0, most=1)
    """Training: largest relative change of brightness, contrast and saturation."""
    corruptions: tuple[str, ...] = bounded(TRAINED_CORRUPTIONS, unique=True)
    """Corruptions seen in training; all others are held back for the robustness test."""
    corrupt_probability: float = bounded(0.5, least=0, most=1)
    """Training: share of the images that get one of these corruptions."""
    max_unreadable: float = bounded(0.01, least=0, most=1)
    """Share of unreadable images that is skipped with a warning; more is refused."""
    read_threads: int = bounded(0, least=0)
    """Threads that read and augment the coming batches (0: one a CPU core, at most 16)."""


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    name: str = "resnet50"
    """Network of F; `python -m experiments.weights --list` shows them all."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: as published; small: 3x3 stride 1, for images up to 48 pixels."""
    weights: str = RANDOM
    """First weights: a file (of PyTorch, safetensors or npz), a directory of them, a run of ours,
    or hf://org/name; random: training from scratch."""
    part: str = ""
    """The part of the file that holds the network, as state_dict_ema or state_dict.encoder_q;
    empty: the one that fits best, which is told."""
    allow_partial: tuple[str, ...] = bounded((), unique=True)
    """Regular expressions of parameters that the weights may lack, have too many, or in another
    shape; all others must fit."""
    head: Literal["none", "imagenet"] = "none"
    """imagenet: the published classifier too; its posterior becomes a descriptor block."""
    mean: tuple[float, ...] = bounded((), lengths=(0, 3))
    """Mean of the images in [0, 1], a figure a channel; empty: that of the weights."""
    std: tuple[float, ...] = bounded((), above=0, lengths=(0, 3))
    """Deviation, likewise."""
    channels: Literal["", "rgb", "bgr"] = ""
    """Order of the channels that the network sees; empty: that of the weights."""
    frozen_stages: int = bounded(0, least=0)
    """Stages of the backbone, from the image upwards, that are not trained."""
    frozen_norm: bool = False
    """Training normalises by the stored BatchNorm statistics and leaves them as they are."""
    remat: bool = False
    """Compute the maps inside a block again in the backward pass: less memory, more time."""


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    embedding_dim: int = bounded(512, above=0)
    """Length of the global descriptor."""
    local_dim: int = bounded(128, above=0)
    """Length of the local descriptor, and of each of the local descriptors it pools."""
    gem_power: float = bounded(3.0, above=0)
    """First value of the learned power of generalised-mean pooling."""
    standardise: bool = False
    """F sees every image at the same mean and contrast."""


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    name: str = "residual"
    """Network G, a file of afa/models/generators."""
    width: int = bounded(32, above=0)
    """Channels at half of the resolution; doubled with every further halving."""
    levels: int = bounded(3, above=0)
    """Halvings of the resolution of an image to be restored; 1: half of the resolution alone."""
    blocks: int = bounded(2, above=0)
    """Residual blocks of two 3x3 convolutions at the lowest resolution; one at every other."""
    latent_dim: int = bounded(32, above=0)
    """Length of the noise z, and of the code of an image."""
    batch_size: int = bounded(0, least=0)
    """Staged: images in a step of G and D, over all devices; 0: data.batch_size."""
    corrupt_probability: float = bounded(0.75, least=0, most=1)
    """Staged: share of the images in the batches of G and D that get a corruption."""


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    width: int = bounded(32, above=0)
    """Channels of the first map; doubled at every level down, up to eight times as many."""
    levels: int = bounded(4, above=0)
    """Halvings of the resolution."""
    spectral_norm: bool = False
    """Divide every kernel by its largest singular value."""


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    enabled: bool = True
    """The adversarial part as a whole; off: the baseline, otherwise identical."""
    feature_epsilon: float = bounded(0.02, least=0)
    """Largest push of the mid map along its gradient, relative to the map's norm; 0: off."""
    feature_direction: Literal["gradient", "random"] = "gradient"
    """random: the control experiment, a push of the same length in a random direction."""
    generator: bool = True
    """Train G and D; their views and features join the fused descriptor."""
    lambda_mse: float = bounded(10.0, least=0)
    """G: weight of the root of each image's mean squared error towards the clean image."""
    lambda_adversarial: float = bounded(0.05, least=0)
    """G: weight of the adversarial term on restored images; 0: no discriminator verdict."""
    lambda_features: float = bounded(1.0, least=0)
    """G: weight of the distance between F's descriptors of restored and clean image."""
    lambda_noise: float = bounded(0.05, least=0)
    """G: weight of the adversarial term on images made from noise alone; 0: off."""
    lambda_code: float = bounded(10.0, least=0)
    """G: weight of the same error of what the decoder of noise makes of the code of a clean image;
    0: off."""
    r1: float = bounded(1.0, least=0)
    """D: weight of the R1 gradient penalty."""
    r1_every: int = bounded(4, above=0)
    """D: the penalty is computed on every such step and weighted up accordingly."""
    diffaugment: bool = True
    """D sees real and generated images through the same differentiable augmentation."""
    gate: Literal["fixed", "learned", "verdict"] = "fixed"
    """How far an image trusts its restored view: always, by a trained gate, or by D's verdict."""
    generated_views: float = bounded(0.0, least=0)
    """Joint schedule: weight of the metric loss on G's images as extra training views."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"
    """Optimiser of F: adamw, sgd, lamb or lion."""
    learning_rate: float = bounded(1e-3, above=0)
    """Peak learning rate of F."""
    backbone_rate: float = bounded(1.0, least=0)
    """Learning rate of the backbone, relative to that of the new parts of F."""
    head_warmup: str = duration("0", most=100)
    """Duration at the beginning in which the new parts of F learn alone."""
    weight_decay: float = bounded(1e-4, least=0)
    """Decoupled weight decay of F, on kernels only."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of every learning rate after the warm-up."""
    warmup: str = duration("5%", most=100)
    """Duration of the linear warm-up."""
    clip: float = bounded(1.0, least=0)
    """Largest global gradient norm of each network; 0: no clipping."""
    accumulate: int = bounded(1, above=0)
    """Steps whose gradients are averaged before the parameters move."""
    generator_learning_rate: float = bounded(4e-4, above=0)
    """Adam learning rate of G."""
    discriminator_learning_rate: float = bounded(4e-4, above=0)
    """Adam learning rate of D."""
    ema_decay: float = bounded(0.999, least=0, below=1)
    """Decay of the moving average of F and G that is evaluated and exported; 0: off. It warms up
    with the updates of each network, so that the first weights do not dominate short runs."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: str = duration("100ep", share=False)
    """Labelled steps (of F)."""
    small_steps: str = duration("0", most=100)
    """Staged: the first of `steps`, on smaller and so cheaper images (progressive resizing)."""
    small_size: int = bounded(32, above=0)
    """Side of the images of these steps, in pixels."""
    schedule: Literal["staged", "joint"] = "staged"
    """staged: F, F with feature augmentation, then G and D on frozen F; joint: all together."""
    plain: str = duration("40%", most=100)
    """Staged: share of `steps` before feature augmentation begins."""
    generator_steps: str = duration("50%")
    """Staged: steps of G and D on frozen F, after `steps`."""
    log_every: str = duration("20", most=100)
    """Steps between log lines, beside one at the end of each stage; 0: none at all."""
    evaluate_every: str = duration("10%", most=100)
    """Steps between evaluations on the validation classes, beside one at the end of each stage;
    0: none at all."""
    checkpoint_every: str = duration("5%", most=100)
    """Steps between checkpoints, beside one at the end of each stage; 0: only there."""
    keep_best: int = bounded(2, least=0)
    """Checkpoints kept by validation MAP@R, beside the latest."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the networks; auto: bfloat16 on accelerators, float32 on the CPU."""
    parallel: Literal["auto", "pmap", "shard_map"] = "auto"
    """How a step is mapped over devices; auto: pmap on one host, shard_map over several."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    batch_size: int = bounded(128, above=0)
    """Images embedded at once, over all devices of the process."""
    views: tuple[str, ...] = bounded(("flip", "median", "standardise"), unique=True)
    """Second views of the image, fused beside the restored one when there is a generator."""
    severities: tuple[int, ...] = bounded((3, 5), least=1, most=5, unique=True)
    """Severities of every corruption in the robustness test."""
    corruption_queries: int = bounded(2000, least=0)
    """Test queries of the robustness test, drawn evenly over the classes, 0: all. Each is embedded
    once for every corruption and severity: 2,000 with two severities are 40,000 images a view."""
    corruption_seed: int = bounded(0, least=0, most=MOST_SEED)
    """Seed of the corrupted queries, one for all runs, so that runs can be compared in pairs."""
    validation_queries: int = bounded(0, least=0)
    """Validation images of the evaluations during training, likewise; 0: all."""
    checkpoint: Literal["last", "best"] = "last"
    """State that is evaluated and exported: the last, or the best by validation MAP@R."""
    protocol: str = "auto"
    """Queries and gallery: query_gallery (as the data set separates them), leave_one_out (the other
    images of the split), halves (of every class), or catalogue (one clean image a class). auto:
    the first of these that the split supports, and catalogue beside it if the split has one."""


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    index: str = "auto"
    """Address of the index built over the exported embeddings: exact://, scann://?OPTION=VALUE,
    milvus://HOST:PORT or milvus://PATH/file.db; auto is scann:// where it is installed."""
    target_recall: float = bounded(0.0, least=0, most=1)
    """Recall of scann:// that its settings are tuned for by measurement; 0 takes those of a
    rule."""
    tune_seconds: float = bounded(60.0, least=0)
    """Time budget of the tuning."""
    tune_for: Literal["batch", "single"] = "batch"
    """Speed that is tuned for: of many queries in one call, or of one query after the other."""
    gallery: Literal["test", "all"] = "test"
    """Images that are exported and searched: the test classes, or the whole data set."""
    results: int = bounded(10, above=0)
    """Results of a search, and k of the recall against exact search."""


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    coordinator: str = "auto"
    """Several processes in one run: host:port of process 0; auto: as SLURM, Open MPI or a TPU slice
    say in the environment; environment: as JAX finds by itself (TPU VM); none: a single process."""
    processes: int = bounded(1, above=0)
    """Number of processes."""
    index: int = bounded(0, least=0)
    """Index of this process."""
    program_cache: str = "auto"
    """Directory of compiled programs, which the next process does not compile again; auto:
    programs in the cache directory; off: none."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Every setting of a run; frozen. The method's published settings are the defaults.

    >>> import dataclasses
    >>> import afa
    >>> config = dataclasses.replace(afa.ExperimentConfig(), seed=3)
    >>> config.seed, config.backbone.name
    (3, 'resnet50')
    """

    seed: int = bounded(0, least=0, most=MOST_SEED)
    """Seed of initial weights, batches, corruptions and noise."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    embedder: EmbedderConfig = dataclasses.field(default_factory=EmbedderConfig)
    loss: Loss = dataclasses.field(default_factory=NormSoftmax)
    generator: GeneratorConfig = dataclasses.field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    retrieval: RetrievalConfig = dataclasses.field(default_factory=RetrievalConfig)
    launch: LaunchConfig = dataclasses.field(default_factory=LaunchConfig)


def generator_data(config: ExperimentConfig) -> DataConfig:
    """The data settings of the stage of G and D on frozen F: its own batch size and share of
    corrupted images, drawn without classes, since no label enters there."""
    return dataclasses.replace(
        config.data,
        batch_size=config.generator.batch_size or config.data.batch_size,
        corrupt_probability=config.generator.corrupt_probability,
        sampler="shuffle",
    )


LOSS_NAME = "loss.name"

# Where and how fast a run computes may change when it is resumed; what it computes may not.
RESUMABLE = (
    "launch.", "train.parallel", "train.log_every", "data.read_threads", "data.cache", "data.path",
    "train.keep_best", "retrieval.", "evaluation.",
)  # fmt: skip


def with_changes(config: Any, **changes: Any) -> Any:
    """A copy with dotted fields changed: `with_changes(c, **{"data.image_size": 64})`.

    Another `loss.name` brings that loss's published settings; it is changed first, so that its
    fields can be changed by the same call.

    Raises:
      UserError: there is no such field, or no such loss.
    """
    for field, value in sorted(changes.items(), key=lambda each: each[0] != LOSS_NAME):
        head, _, rest = field.partition(".")
        if isinstance(config, Loss) and field == "name":
            config = losses.named(value, config)
            continue
        refuse_unknown(field, config)
        new = with_changes(getattr(config, head), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: new})
    return config


def refuse_unknown(field: str, config: Any, dashes: str = "", hint: str = "") -> None:
    """Refuses a dotted field that a configuration does not have.

    Args:
      dashes, hint: written before and after the name, as a command line has them.

    Raises:
      UserError: naming the nearest field, or for a loss all of its fields.
    """
    names = flatten(config)
    if field in names or hasattr(config, field):
        return
    loss = getattr(config, "loss", None)
    if isinstance(loss, Loss) and field.startswith("loss."):
        own = ", ".join(name for name in names if name.startswith("loss."))
        raise UserError(
            f"{dashes}{field} is no field of {LOSS_NAME}={loss.name!r}{nearest(field, names)} "
            f"(allowed: {own})"
        )
    raise UserError(f"{dashes}{field} is no field{nearest(field, names)}{hint}")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Dotted name, field and value of every leaf."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def flatten(config: Any) -> dict[str, Any]:
    """Dotted field name -> value, for every leaf."""
    return {name: value for name, _, value in leaves(config)}


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Nested plain values, as they stand in JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], into: Any = None) -> Any:
    """The inverse of `to_dict`; fields a stored configuration lacks keep their default."""
    config = ExperimentConfig() if into is None else into
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changes = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(
                f"stored configuration: {name!r} is no field of {type(config).__name__}"
            )
        if dataclasses.is_dataclass(into := known[name]):
            if isinstance(into, Loss) and "name" in value:
                into = losses.named(value["name"], into)
            changes[name] = from_dict(value, into)
        else:
            changes[name] = tuple(value) if isinstance(known[name], tuple) else value
    return dataclasses.replace(config, **changes)


def differences(stored: ExperimentConfig, now: ExperimentConfig) -> list[str]:
    """`field: stored -> now` for every field that decides what a run computes and differs. Of two
    losses their names, and what both have."""
    before, after = flatten(stored), flatten(now)
    return [
        f"{name}: {before[name]!r} -> {after[name]!r}"
        for name in after
        if before.get(name, after[name]) != after[name] and not name.startswith(RESUMABLE)
    ]


def steps_of(field: str, duration: str, *, whole: int, epoch: int) -> int:
    """Steps in a duration: "500", "20ep" or "40%".

    Args:
      field: its name, for the error.
      duration: the text.
      whole: steps that "%" refers to.
      epoch: steps of one epoch.

    Raises:
      UserError: the text is none of the three forms, or negative.
    """
    forms = {"%": whole / 100, "ep": epoch}
    for suffix, factor in forms.items():
        if duration.endswith(suffix):
            number, unit = duration.removesuffix(suffix), factor
            break
    else:
        number, unit = duration, 1
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f'{field}={duration!r} is no duration (allowed: "500", "20ep", "40%")')
    return round(value * unit)


def from_scratch(config: ExperimentConfig) -> ExperimentConfig:
    """A recipe without its published weights, and without the settings that go with them."""
    usual = flatten(ExperimentConfig())
    return with_changes(
        config, **{"backbone.weights": RANDOM} | {name: usual[name] for name in FINE_TUNING}
    )
