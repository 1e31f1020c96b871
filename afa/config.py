"""Every setting of a run: nested frozen dataclasses, read by `python -m experiments.run`.

The text under a field is what `--help` shows. A duration is a string: "500" steps, "20ep" epochs
of the training images, or "40%" of the whole it belongs to.
"""

import dataclasses
import json
from typing import Any, Literal

from afa.errors import UserError, nearest

TRAINED_CORRUPTIONS = ("gaussian_noise", "gaussian_blur", "occlusion", "low_resolution")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = "synthetic"
    """Data set: synthetic, folder, inshop, gldv2, or tfds:NAME."""
    path: str = ""
    """folder: the directory of class folders; inshop, gldv2: the one that holds their lists; tfds:
    the data_dir (empty: the TFDS default)."""
    cache: str = ""
    """Where the synthetic set is built (empty: ~/.cache/afa)."""
    image_size: int = 224
    """Side of the square images the networks see, in pixels."""
    crop_fraction: float = 1.0
    """Evaluation: the shorter side becomes image_size / crop_fraction, then a centre crop."""
    batch_size: int = 64
    """Images a step, over all devices."""
    sampler: Literal["pk", "shuffle"] = "pk"
    """pk: batch_size / images_per_class classes with images_per_class images each; shuffle."""
    images_per_class: int = 4
    """K of the pk sampler."""
    validation_fraction: float = 0.2
    """Share of the training classes held out as validation classes."""
    folds: int = 0
    """Cross-validation: the training classes are divided in so many parts, of which one validates;
    test classes stay as they are. 0: off, validation_fraction decides."""
    fold: int = 0
    """The part that validates, 0 to folds - 1: one run each."""
    split_seed: int = 0
    """Chooses the validation classes, or divides the training classes in folds."""
    objects: int = 160
    """Synthetic set: number of objects."""
    views: int = 20
    """Synthetic set: in-the-wild views of each object, beside one catalogue view."""
    render_size: int = 96
    """Synthetic set: side of the rendered images, in pixels."""
    crop_scale: float = 0.6
    """Training: smallest share of the area a random crop keeps."""
    flip: bool = True
    """Training: mirror half of the images."""
    jitter: float = 0.2
    """Training: largest relative change of brightness, contrast and saturation."""
    corruptions: tuple[str, ...] = TRAINED_CORRUPTIONS
    """Corruptions seen in training; all others are held back for the robustness test."""
    corrupt_probability: float = 0.5
    """Training: share of the images that get one of these corruptions."""
    max_unreadable: float = 0.01
    """Share of unreadable images that is skipped with a warning; more is refused."""
    read_threads: int = 2
    """Threads that read and augment the coming batches."""


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    name: str = "resnet50"
    """Network of F; `python -m experiments.weights --list` shows them all."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: as published; small: 3x3 stride 1, for images up to 48 pixels."""
    weights: str = ""
    """First weights: a file (.pth, .pt, .bin, .safetensors, .npz), a directory of them, a run of
    ours, or hf://org/name; empty: random."""
    allow_partial: tuple[str, ...] = ()
    """Regular expressions of parameters that the weights may lack, have too many, or in another
    shape; all others must fit."""
    head: Literal["none", "imagenet"] = "none"
    """imagenet: the published classifier too; its posterior becomes a descriptor block."""
    mean: tuple[float, ...] = ()
    """Mean of the images in [0, 1], a figure a channel; empty: that of the weights."""
    std: tuple[float, ...] = ()
    """Deviation, likewise."""
    channels: Literal["", "rgb", "bgr"] = ""
    """Order of the channels that the network sees; empty: that of the weights."""
    frozen_stages: int = 0
    """Stages of the backbone, from the image upwards, that are not trained."""
    frozen_norm: bool = False
    """Training normalises by the stored BatchNorm statistics and leaves them as they are."""
    remat: bool = False
    """Compute the maps inside a block again in the backward pass: less memory, more time."""


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    embedding_dim: int = 512
    """Length of the global descriptor."""
    local_dim: int = 128
    """Length of the local descriptor, and of each of the local descriptors it pools."""
    gem_power: float = 3.0
    """First value of the learned power of generalised-mean pooling."""
    standardise: bool = False
    """F sees every image at the same mean and contrast."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    name: str = "norm_softmax"
    """Metric loss: norm_softmax, arcface, proxy_anchor, multi_similarity, triplet, contrastive
    or supcon."""
    temperature: float = 0.05
    """norm_softmax, supcon: divides the cosine."""
    scale: float = 32.0
    """arcface, proxy_anchor: multiplies the cosine."""
    margin: float = 0.1
    """arcface (radians), proxy_anchor, triplet, contrastive (cosine)."""
    local_weight: float = 0.5
    """Weight of the loss of the local descriptor beside the global one (weight 1)."""
    fused_weight: float = 0.5
    """Weight of the loss of the fused (global, local) descriptor."""


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    width: int = 32
    """Channels at half of the resolution; doubled with every further halving."""
    levels: int = 3
    """Halvings of the resolution of an image to be restored; 1: half of the resolution alone."""
    blocks: int = 2
    """Residual blocks of two 3x3 convolutions at the lowest resolution; one at every other."""
    latent_dim: int = 32
    """Length of the noise z, and of the code of an image."""
    batch_size: int = 0
    """Staged: images in a step of G and D, over all devices; 0: data.batch_size."""
    corrupt_probability: float = 0.75
    """Staged: share of the images in the batches of G and D that get a corruption."""


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    width: int = 32
    """Channels of the first map; doubled at every level down, up to eight times as many."""
    levels: int = 4
    """Halvings of the resolution."""
    spectral_norm: bool = False
    """Divide every kernel by its largest singular value."""


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    enabled: bool = True
    """The adversarial part as a whole; off: the baseline, otherwise identical."""
    feature_epsilon: float = 0.02
    """Largest push of the mid map along its gradient, relative to the map's norm; 0: off."""
    feature_direction: Literal["gradient", "random"] = "gradient"
    """random: the control experiment, a push of the same length in a random direction."""
    generator: bool = True
    """Train G and D; their views and features join the fused descriptor."""
    lambda_mse: float = 10.0
    """G: weight of the root of each image's mean squared error towards the clean image."""
    lambda_adversarial: float = 0.05
    """G: weight of the adversarial term on restored images; 0: no discriminator verdict."""
    lambda_features: float = 1.0
    """G: weight of the distance between F's descriptors of restored and clean image."""
    lambda_noise: float = 0.05
    """G: weight of the adversarial term on images made from noise alone; 0: off."""
    lambda_code: float = 10.0
    """G: weight of the same error of what the decoder of noise makes of the code of a clean image;
    0: off."""
    r1: float = 1.0
    """D: weight of the R1 gradient penalty."""
    r1_every: int = 4
    """D: the penalty is computed on every such step and weighted up accordingly."""
    diffaugment: bool = True
    """D sees real and generated images through the same differentiable augmentation."""
    gate: Literal["fixed", "learned", "verdict"] = "fixed"
    """How far an image trusts its restored view: always, by a trained gate, or by D's verdict."""
    generated_views: float = 0.0
    """Joint schedule: weight of the metric loss on G's images as extra training views."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"
    """Optimiser of F: adamw, sgd, lamb or lion."""
    learning_rate: float = 1e-3
    """Peak learning rate of F."""
    backbone_rate: float = 1.0
    """Learning rate of the backbone, relative to that of the new parts of F."""
    head_warmup: str = "0"
    """Duration at the beginning in which the new parts of F learn alone."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of F, on kernels only."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of every learning rate after the warm-up."""
    warmup: str = "5%"
    """Duration of the linear warm-up."""
    clip: float = 1.0
    """Largest global gradient norm of each network; 0: no clipping."""
    accumulate: int = 1
    """Steps whose gradients are averaged before the parameters move."""
    generator_learning_rate: float = 4e-4
    """Adam learning rate of G."""
    discriminator_learning_rate: float = 4e-4
    """Adam learning rate of D."""
    ema_decay: float = 0.999
    """Decay of the moving average of F and G that is evaluated and exported; 0: off. It warms up
    with the updates of each network, so that the first weights do not dominate short runs."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: str = "100ep"
    """Labelled steps (of F)."""
    small_steps: str = "0"
    """Staged: the first of `steps`, on smaller and so cheaper images (progressive resizing)."""
    small_size: int = 32
    """Side of the images of these steps, in pixels."""
    schedule: Literal["staged", "joint"] = "staged"
    """staged: F, F with feature augmentation, then G and D on frozen F; joint: all together."""
    plain: str = "40%"
    """Staged: share of `steps` before feature augmentation begins."""
    generator_steps: str = "50%"
    """Staged: steps of G and D on frozen F, after `steps`."""
    log_every: str = "20"
    """Steps between log lines."""
    evaluate_every: str = "10%"
    """Steps between evaluations on the validation classes."""
    checkpoint_every: str = "5%"
    """Steps between checkpoints."""
    keep_best: int = 2
    """Checkpoints kept by validation MAP@R, beside the latest."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the networks; auto: bfloat16 on accelerators, float32 on the CPU."""
    parallel: Literal["auto", "pmap", "shard_map"] = "auto"
    """How a step is mapped over devices; auto: pmap on one host, shard_map over several."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    batch_size: int = 128
    """Images embedded at once, over all devices of the process."""
    views: tuple[str, ...] = ("flip", "median", "standardise")
    """Second views of the image, fused beside the restored one when there is a generator."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Severities of every corruption in the robustness test."""
    corruption_queries: int = 0
    """Test queries of the robustness test, drawn evenly over the classes; 0: all."""
    validation_queries: int = 0
    """Validation images of the evaluations during training, likewise; 0: all."""
    checkpoint: Literal["last", "best"] = "last"
    """State that is evaluated and exported: the last, or the best by validation MAP@R."""
    protocol: Literal["auto", "leave_one_out", "query_gallery", "catalogue"] = "auto"
    """Gallery: the other images of the split, those that the data set sets apart as its gallery,
    or one catalogue image a class. auto: the first is the headline, or the second where the data
    set tells queries from gallery, and the third is reported beside it where there are such."""


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    index: str = "auto"
    """Address of the index built over the exported embeddings: exact://, scann://?OPTION=VALUE,
    milvus://HOST:PORT or milvus://PATH/file.db; auto is scann:// where it is installed."""
    target_recall: float = 0.0
    """Recall of scann:// that its settings are tuned for by measurement; 0 takes those of a
    rule."""
    tune_seconds: float = 60.0
    """Time budget of the tuning."""
    tune_for: Literal["batch", "single"] = "batch"
    """Speed that is tuned for: of many queries in one call, or of one query after the other."""
    gallery: Literal["test", "all"] = "test"
    """Images that are exported and searched: the test classes, or the whole data set."""
    results: int = 10
    """Results of a search, and k of the recall against exact search."""


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    coordinator: str = ""
    """host:port of process 0 when several processes share one run."""
    processes: int = 1
    """Number of processes."""
    index: int = 0
    """Index of this process."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    seed: int = 0
    """Seed of initial weights, batches, corruptions and noise."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    embedder: EmbedderConfig = dataclasses.field(default_factory=EmbedderConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
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


# Where and how fast a run computes may change when it is resumed; what it computes may not.
RESUMABLE = (
    "launch.", "train.parallel", "train.log_every", "data.read_threads", "data.cache", "data.path",
    "train.keep_best", "retrieval.", "evaluation.",
)  # fmt: skip


def with_changes(config: Any, **changes: Any) -> Any:
    """A copy with dotted fields changed: `with_changes(c, **{"data.image_size": 64})`.

    Raises:
      UserError: there is no such field.
    """
    for field, value in changes.items():
        head, _, rest = field.partition(".")
        if field not in (names := flatten(config)) and not hasattr(config, field):
            raise UserError(f"{field} is no field{nearest(field, names)}")
        new = with_changes(getattr(config, head), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: new})
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> value, for every leaf."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


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
        if dataclasses.is_dataclass(known[name]):
            changes[name] = from_dict(value, known[name])
        else:
            changes[name] = tuple(value) if isinstance(known[name], tuple) else value
    return dataclasses.replace(config, **changes)


def differences(stored: ExperimentConfig, now: ExperimentConfig) -> list[str]:
    """`field: stored -> now` for every field that decides what a run computes and differs."""
    before, after = flatten(stored), flatten(now)
    return [
        f"{name}: {before[name]!r} -> {after[name]!r}"
        for name in after
        if before[name] != after[name] and not name.startswith(RESUMABLE)
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


def validate(config: ExperimentConfig) -> None:
    """Checks what types cannot: ranges, and fields that must fit each other.

    Raises:
      UserError: naming the first field that does not fit.
    """
    positive = (
        "data.image_size", "data.batch_size", "data.images_per_class", "embedder.embedding_dim",
        "embedder.local_dim", "generator.width", "generator.levels", "generator.blocks",
        "generator.latent_dim", "discriminator.width",
        "discriminator.levels", "optim.learning_rate", "optim.accumulate", "loss.temperature",
        "evaluation.batch_size", "retrieval.results", "train.small_size",
        "adversarial.r1_every",
    )  # fmt: skip
    values = flatten(config)
    for name in positive:
        if not values[name] > 0:
            raise UserError(f"{name}={values[name]!r} must be above 0")
    not_negative = (
        "data.jitter", "data.read_threads", "optim.weight_decay", "optim.clip", "train.keep_best",
        "generator.batch_size", "adversarial.lambda_mse", "adversarial.lambda_adversarial",
        "adversarial.lambda_features", "adversarial.lambda_noise", "adversarial.lambda_code",
        "adversarial.feature_epsilon", "adversarial.r1", "evaluation.corruption_queries",
        "optim.backbone_rate",
        "evaluation.validation_queries",
    )  # fmt: skip
    for name in not_negative:
        if not values[name] >= 0:
            raise UserError(f"{name}={values[name]!r} must not be negative")
    shares = (
        "data.corrupt_probability", "generator.corrupt_probability", "data.crop_scale",
        "data.validation_fraction",
        "data.max_unreadable",
    )  # fmt: skip
    for name in shares:
        if not 0 <= values[name] <= 1:
            raise UserError(f"{name}={values[name]!r} must lie between 0 and 1")
    if not 0 < config.data.crop_fraction <= 1:
        raise UserError(f"data.crop_fraction={config.data.crop_fraction!r} must lie in (0, 1]")
    if not 0 <= config.optim.ema_decay < 1:
        raise UserError(f"optim.ema_decay={config.optim.ema_decay!r} must lie in [0, 1)")
    for name in ("backbone.mean", "backbone.std"):
        if len(values[name]) not in (0, 3):
            raise UserError(f"{name}={values[name]!r} must have 3 figures, one a channel, or none")
    if not all(figure > 0 for figure in config.backbone.std):
        raise UserError(f"backbone.std={config.backbone.std!r} must be above 0")
    folds, fold = config.data.folds, config.data.fold
    if folds < 0 or folds == 1:
        raise UserError(f"data.folds={folds} must be 2 or more, or 0: no cross-validation")
    if not 0 <= fold < max(folds, 1):
        allowed = f"0 to {folds - 1}" if folds else "0, as data.folds=0"
        raise UserError(f"data.fold={fold} is not there (allowed: {allowed})")
    if config.train.schedule == "joint" and config.generator.batch_size:
        raise UserError(
            f"generator.batch_size={config.generator.batch_size} needs train.schedule='staged': "
            "a joint step gives F, G and D the same batch"
        )
    smallest = 2 ** max(config.generator.levels, config.discriminator.levels)
    has_generator = config.adversarial.enabled and config.adversarial.generator
    if has_generator and config.data.image_size % smallest:
        raise UserError(
            f"data.image_size={config.data.image_size} must be a multiple of {smallest}, "
            "2 to the larger of generator.levels and discriminator.levels"
        )
    severities = config.evaluation.severities
    if not severities or any(severity not in range(1, 6) for severity in severities):
        raise UserError(f"evaluation.severities={severities!r} must be some of 1, 2, 3, 4, 5")
