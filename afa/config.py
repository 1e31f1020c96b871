"""All settings of a run: nested frozen dataclasses, read by `python -m experiments.run`.

`--help` shows the text below each field. A duration is a string: "500" steps, "20ep" epochs of the
training images, or "40%" of a total.
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
MAX_SEED = 2**32 - 1  # of both JAX and NumPy

RANDOM = "random"  # value of `backbone.weights` for training from scratch
# Fields that a recipe sets for fine-tuning; training from scratch uses their defaults.
FINE_TUNING = ("backbone.frozen_norm", "optim.backbone_rate", "optim.head_warmup")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = "synthetic"
    """Data set: synthetic, folder, inshop, gldv2, or tfds:NAME."""
    path: str = ""
    """folder: directory of class folders; inshop, gldv2: directory with their lists; tfds: data_dir
    (empty: the TFDS default)."""
    cache: str = ""
    """Directory of the synthetic set (empty: ~/.cache/afa or, if not writable, afa-cache-UID in the
    directory for temporary files)."""
    image_size: int = bounded(224, above=0)
    """Side of the square input images of the networks, in pixels."""
    crop_fraction: float = bounded(1.0, above=0, most=1)
    """Evaluation: the shorter side becomes image_size / crop_fraction, then a centre crop."""
    batch_size: int = bounded(64, above=0)
    """Images per step, over all devices."""
    sampler: Literal["pk", "shuffle"] = "pk"
    """pk: batch_size / images_per_class classes with images_per_class images; shuffle: random."""
    images_per_class: int = bounded(4, above=0)
    """K of the pk sampler."""
    validation_fraction: float = bounded(0.2, least=0, most=1)
    """Fraction of the training classes used as validation classes."""
    folds: int = bounded(0, least=0)
    """Cross-validation: number of parts of the training classes, one of which is for validation;
    test classes do not change. 0: off, validation_fraction is used."""
    fold: int = bounded(0, least=0)
    """The part for validation, 0 to folds - 1; one run for each."""
    split_seed: int = bounded(0, least=0, most=MAX_SEED)
    """Seed of the choice of validation classes, or of the division into folds."""
    objects: int = bounded(160, above=0)
    """Synthetic set: number of objects."""
    views: int = bounded(20, above=0)
    """Synthetic set: in-the-wild views per object, in addition to one catalogue view."""
    render_size: int = bounded(96, above=0)
    """Synthetic set: side of the rendered images, in pixels."""
    crop_scale: float = bounded(0.6, above=0, most=1)
    """Training: smallest fraction of the area of a random crop."""
    flip: bool = True
    """Training: mirror half of the images."""
    jitter: float = bounded(0.2, least=0, most=1)
    """Training: largest relative change of brightness, contrast and saturation."""
    corruptions: tuple[str, ...] = bounded(TRAINED_CORRUPTIONS, unique=True)
    """Corruptions used in training; all others are held back for the robustness test."""
    corrupt_probability: float = bounded(0.5, least=0, most=1)
    """Training: fraction of the images with one of these corruptions."""
    family: str = ""
    """Training: also transform images at random by a family of afa/data/families (augmix, prime,
    random_convolution, noise, overlays, fills), before any corruption; empty: none."""
    family_probability: float = bounded(0.5, least=0, most=1)
    """Training: fraction of the images that the family transforms."""
    max_unreadable: float = bounded(0.01, least=0, most=1)
    """Largest fraction of unreadable images that is skipped with a warning; more is an error."""
    read_threads: int = bounded(0, least=0)
    """Threads that read and augment the next batches (0: one per CPU core, at most 16)."""


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    name: str = "resnet50"
    """Network of F; `python -m experiments.weights --list` shows all."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: as published; small: 3x3 stride 1, for images up to 48 pixels."""
    weights: str = RANDOM
    """Initial weights: a file (PyTorch, safetensors or npz), a directory of such files, a run of
    afa, hf://org/name, or pip://NAME (an installed package); random: training from scratch."""
    part: str = ""
    """Part of the file with the weights, such as state_dict_ema or state_dict.encoder_q; empty: the
    best match, which is printed."""
    allow_partial: tuple[str, ...] = bounded((), unique=True)
    """Regular expressions of parameters that may be missing, unexpected or of another shape in the
    weights; all others must match."""
    head: Literal["none", "imagenet"] = "none"
    """imagenet: also load the published classifier; its posterior becomes a descriptor block."""
    mean: tuple[float, ...] = bounded((), lengths=(0, 3))
    """Mean per channel of images in [0, 1]; empty: that of the weights."""
    std: tuple[float, ...] = bounded((), above=0, lengths=(0, 3))
    """Standard deviation per channel; empty: that of the weights."""
    channels: Literal["", "rgb", "bgr"] = ""
    """Channel order of the network input; empty: that of the weights."""
    frozen_stages: int = bounded(0, least=0)
    """Number of frozen backbone stages, counted from the input."""
    frozen_norm: bool = False
    """Training uses the stored BatchNorm statistics and does not update them."""
    remat: bool = False
    """Recompute activations of each block in the backward pass: less memory, more time."""


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
    embedding_dim: int = bounded(512, above=0)
    """Dimension of the global descriptor."""
    local_dim: int = bounded(128, above=0)
    """Dimension of the local descriptor and of the local features it pools."""
    gem_power: float = bounded(3.0, above=0)
    """Initial value of the learned power of generalised-mean pooling."""
    standardise: bool = False
    """Normalise every input image of F to the same mean and contrast."""


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    name: str = "residual"
    """Network G of afa/models/generators: residual restores images, features mid maps of F,
    inpainting replaces the pixels that D finds damaged; control without a network: filling."""
    width: int = bounded(32, above=0)
    """Channels; residual: at half resolution, doubled at every further halving."""
    levels: int = bounded(3, above=0)
    """residual: halvings of the resolution of the corrupted image; 1: half resolution only."""
    blocks: int = bounded(2, above=0)
    """Residual blocks of two 3x3 convolutions; residual: at the lowest resolution, and one at every
    other."""
    latent_dim: int = bounded(32, above=0)
    """Dimension of the noise z and of the code of an image."""
    batch_size: int = bounded(0, least=0)
    """Staged: images per step of G and D, over all devices; 0: data.batch_size."""
    corrupt_probability: float = bounded(0.75, least=0, most=1)
    """Staged: fraction of corrupted images in the batches of G and D."""
    family: str = ""
    """Staged: family of transforms in the batches of G and D, as data.family; empty: none. Needed
    by inpainting: only overlays, fills and occlusion show D which pixels are damaged."""
    family_probability: float = bounded(0.5, least=0, most=1)
    """Staged: fraction of the images of these batches that the family transforms."""


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    width: int = bounded(32, above=0)
    """Channels of the first feature map; doubled at every level, up to eight times as many, or
    twice as many if D localises damage (generator.name=inpainting)."""
    levels: int = bounded(4, above=0)
    """Halvings of the resolution."""
    spectral_norm: bool = False
    """Divide every kernel by its largest singular value."""
    judges_views: bool = True
    """Also train D to tell clean images from corrupted and from median-filtered ones, so that it
    can choose the view of a query."""


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    enabled: bool = True
    """The whole adversarial part; False: the baseline, otherwise identical."""
    feature_epsilon: float = bounded(0.02, least=0)
    """Largest perturbation of the mid map, relative to the norm of the map; 0: off."""
    perturbation: str = "gradient"
    """Perturbation of the mid map: gradient, statistics (only mean and deviation of each channel,
    along the gradient), either (half of the images each); controls of the same norm: random,
    random_statistics; rival: mixstyle."""
    generator: bool = True
    """Train G and D; their views and features are offered to the fused descriptor."""
    lambda_reconstruction: float = bounded(10.0, least=0)
    """G: weight of the root of each image's mean squared error to the clean image."""
    lambda_adversarial: float = bounded(0.05, least=0)
    """G: weight of the adversarial term on restored images; 0: off."""
    lambda_features: float = bounded(1.0, least=0)
    """G: weight of the distance between the descriptors (F) of restored and clean image."""
    lambda_noise: float = bounded(0.05, least=0)
    """G: weight of the adversarial term on images sampled from noise; 0: off."""
    lambda_code: float = bounded(10.0, least=0)
    """G: weight of the reconstruction error of a clean image decoded from its code; 0: off."""
    r1: float = bounded(1.0, least=0)
    """D: weight of the R1 gradient penalty."""
    r1_every: int = bounded(4, above=0)
    """D: the penalty is computed every r1_every steps, with r1_every times the weight."""
    diffaugment: bool = True
    """D: apply the same differentiable augmentation to real and generated images (not mid maps)."""
    generated_views: float = bounded(0.0, least=0)
    """Joint schedule: weight of the metric loss on restored images as extra training views."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"
    """Optimiser of F: adamw, sgd, lamb or lion."""
    learning_rate: float = bounded(1e-3, above=0)
    """Peak learning rate of F."""
    backbone_rate: float = bounded(1.0, least=0)
    """Learning rate of the backbone, relative to that of the new layers of F."""
    head_warmup: str = duration("0", most=100)
    """Duration at the start in which only the new layers of F are trained."""
    weight_decay: float = bounded(1e-4, least=0)
    """Decoupled weight decay of F; kernels only."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of all learning rates after the warm-up."""
    warmup: str = duration("5%", most=100)
    """Duration of the linear warm-up."""
    clip: float = bounded(1.0, least=0)
    """Largest global gradient norm of each network; 0: no clipping."""
    sam_radius: float = bounded(0.0, least=0)
    """Sharpness-aware minimisation of F: distance to the parameters at which the gradient is taken,
    published 0.05; doubles the time of a step; 0: off."""
    accumulate: int = bounded(1, above=0)
    """Gradient accumulation: steps whose gradients are averaged for one parameter update."""
    generator_learning_rate: float = bounded(4e-4, above=0)
    """Adam learning rate of G."""
    discriminator_learning_rate: float = bounded(4e-4, above=0)
    """Adam learning rate of D."""
    ema_decay: float = bounded(0.999, least=0, below=1)
    """Decay of the moving average of F and G that is evaluated and exported; 0: off. It warms up
    with the updates of each network, so the initial weights do not dominate in short runs."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: str = duration("100ep", share=False)
    """Training steps of F (with labels)."""
    small_steps: str = duration("0", most=100)
    """Staged: number of first steps on smaller images (progressive resizing)."""
    small_size: int = bounded(32, above=0)
    """Side of the images in small_steps, in pixels."""
    schedule: Literal["staged", "joint"] = "staged"
    """staged: F, F with feature augmentation, then G and D on frozen F; joint: all together."""
    consistency: float = bounded(0.0, least=0)
    """Weight of the distance 1 - cos between the descriptors (F) of an image and of its clean view;
    0: off."""
    plain: str = duration("40%", most=100)
    """Staged: steps before feature augmentation starts, part of `steps`."""
    generator_steps: str = duration("50%")
    """Staged: steps of G and D on frozen F, after `steps`."""
    log_every: str = duration("20", most=100)
    """Steps between log lines, in addition to one at the end of each stage; 0: no log lines."""
    evaluate_every: str = duration("10%", most=100)
    """Steps between evaluations on the validation classes, in addition to one at the end of each
    stage; 0: no evaluations."""
    checkpoint_every: str = duration("5%", most=100)
    """Steps between checkpoints, in addition to one at the end of each stage; 0: only those."""
    keep_best: int = bounded(2, least=0)
    """Checkpoints kept by validation MAP@R, in addition to the latest."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype of the networks; auto: bfloat16 on accelerators, float32 on the CPU."""
    parallel: Literal["auto", "pmap", "shard_map"] = "auto"
    """Mapping of steps over devices; auto: pmap on one host, shard_map on several."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    batch_size: int = bounded(128, above=0)
    """Images per embedding batch, over all devices of the process."""
    views: tuple[str, ...] = bounded(("flip", "median", "standardise"), unique=True)
    """Extra views of the image, fused in addition to the restored view of a generator."""
    search_cost: float = bounded(1.4, least=0)
    """Largest cost of a query with the fused descriptor, in forward passes of F; blocks and routes
    beyond it are not chosen; 0: no limit."""
    severities: tuple[int, ...] = bounded((3, 5), least=1, most=5, unique=True)
    """Severities of each corruption in the robustness test."""
    corruption_queries: int = bounded(2000, least=0)
    """Queries of the robustness test, drawn evenly over the classes; 0: all. Each is embedded once
    per corruption and severity: 2,000 with two severities are 40,000 images per view."""
    corruption_seed: int = bounded(0, least=0, most=MAX_SEED)
    """Seed of the corrupted queries, the same for all runs, for paired comparisons."""
    validation_queries: int = bounded(0, least=0)
    """Validation images of evaluations during training, drawn evenly; 0: all."""
    checkpoint: Literal["last", "best"] = "last"
    """Checkpoint that is evaluated and exported: the last, or the best by validation MAP@R."""
    protocol: str = "auto"
    """Queries and gallery: query_gallery (defined by the data set), leave_one_out (the other images
    of the split), halves (of every class), or catalogue (one clean image per class). auto: the
    first of these that the split supports, and also catalogue if there are catalogue images."""


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    index: str = "auto"
    """URI of the index over the exported embeddings: exact://, scann://?OPTION=VALUE,
    milvus://HOST:PORT or milvus://PATH/file.db; auto: scann:// if it is installed."""
    target_recall: float = bounded(0.0, least=0, most=1)
    """Recall that the settings of scann:// are tuned for by measurement; 0: settings by a rule."""
    tune_seconds: float = bounded(60.0, least=0)
    """Time budget of the tuning."""
    tune_for: Literal["batch", "single"] = "batch"
    """Tune the speed of many queries per call, or of one query per call."""
    gallery: Literal["test", "all"] = "test"
    """Images that are exported and searched: the test classes, or the whole data set."""
    results: int = bounded(10, above=0)
    """Results per query, and k of the recall against exact search."""


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    coordinator: str = "auto"
    """Runs with several processes: host:port of process 0; auto: from the environment variables of
    SLURM, Open MPI or a TPU slice; environment: detected by JAX (TPU VM); none: one process."""
    processes: int = bounded(1, above=0)
    """Number of processes."""
    index: int = bounded(0, least=0)
    """Index of this process."""
    program_cache: str = "auto"
    """Directory of compiled programs, reused by later processes; auto: programs in the cache
    directory; off: none."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """All settings of a run; frozen. The defaults are the published settings of the method.

    >>> import dataclasses
    >>> import afa
    >>> config = dataclasses.replace(afa.ExperimentConfig(), seed=3)
    >>> config.seed, config.backbone.name
    (3, 'resnet50')
    """

    seed: int = bounded(0, least=0, most=MAX_SEED)
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
    """Returns the data settings of the stage that trains G and D: own batch size, own fraction of
    corrupted images, own family of transforms, and shuffled batches, because this stage uses no
    labels."""
    return dataclasses.replace(
        config.data,
        batch_size=config.generator.batch_size or config.data.batch_size,
        corrupt_probability=config.generator.corrupt_probability,
        family=config.generator.family,
        family_probability=config.generator.family_probability,
        sampler="shuffle",
    )


LOSS_NAME = "loss.name"

# Fields that may change when a run is resumed, because they do not affect what is trained.
RESUMABLE = (
    "launch.", "train.parallel", "train.log_every", "data.read_threads", "data.cache", "data.path",
    "train.keep_best", "retrieval.", "evaluation.",
)  # fmt: skip


def with_changes(config: Any, **changes: Any) -> Any:
    """Returns a copy with dotted fields changed: `with_changes(c, **{"data.image_size": 64})`.

    A new `loss.name` sets the published settings of that loss. It is applied first, so the same
    call can change fields of the loss.

    Raises:
      UserError: unknown field or loss.
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
    """Checks that a configuration has a dotted field.

    Args:
      dashes, hint: text before and after the name in the message, for command lines.

    Raises:
      UserError: it has not; the message gives the nearest field, or for a loss all of its fields.
    """
    names = flatten(config)
    if field in names or hasattr(config, field):
        return
    loss = getattr(config, "loss", None)
    if isinstance(loss, Loss) and field.startswith("loss."):
        own = ", ".join(name for name in names if name.startswith("loss."))
        raise UserError(
            f"{dashes}{field} is not a field of {LOSS_NAME}={loss.name!r}{nearest(field, names)} "
            f"(allowed: {own})"
        )
    raise UserError(f"{dashes}{field} is not a field{nearest(field, names)}{hint}")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yields dotted name, field and value of every leaf."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def flatten(config: Any) -> dict[str, Any]:
    """Returns dotted field name -> value for every leaf."""
    return {name: value for name, _, value in leaves(config)}


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Converts a configuration to JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], into: Any = None) -> Any:
    """Inverse of `to_dict`; missing fields have their defaults."""
    config = ExperimentConfig() if into is None else into
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changes = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(
                f"stored configuration: {name!r} is not a field of {type(config).__name__}"
            )
        if dataclasses.is_dataclass(into := known[name]):
            if isinstance(into, Loss) and "name" in value:
                into = losses.named(value["name"], into)
            changes[name] = from_dict(value, into)
        else:
            changes[name] = tuple(value) if isinstance(known[name], tuple) else value
    return dataclasses.replace(config, **changes)


def differences(stored: ExperimentConfig, now: ExperimentConfig) -> list[str]:
    """Returns `field: stored -> now` for every changed field that affects what a run computes. For
    different losses, only their names and shared fields are compared."""
    before, after = flatten(stored), flatten(now)
    return [
        f"{name}: {before[name]!r} -> {after[name]!r}"
        for name in after
        if before.get(name, after[name]) != after[name] and not name.startswith(RESUMABLE)
    ]


def steps_of(field: str, duration: str, *, total: int, epoch: int) -> int:
    """Converts a duration to steps: "500", "20ep" or "40%".

    Args:
      field: name of the setting, for the error.
      duration: the text.
      total: steps that "%" refers to.
      epoch: steps per epoch.

    Raises:
      UserError: the text has none of the three forms, or is negative.
    """
    forms = {"%": total / 100, "ep": epoch}
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
        raise UserError(f'{field}={duration!r} is not a duration (allowed: "500", "20ep", "40%")')
    return round(value * unit)


def from_scratch(config: ExperimentConfig) -> ExperimentConfig:
    """Returns a recipe without published weights and fine-tuning settings."""
    defaults = flatten(ExperimentConfig())
    return with_changes(
        config, **{"backbone.weights": RANDOM} | {name: defaults[name] for name in FINE_TUNING}
    )
