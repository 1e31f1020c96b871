"""Checks a configuration: type and bounds of every field, and fields that depend on each other."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from afa.bounds import KEY, KINDS, Bounds, Duration
from afa.config import LOSS_NAME, RANDOM, ExperimentConfig, flatten, leaves, steps_of, with_changes
from afa.errors import UserError, choose
from afa.losses.perturbations import PERTURBATIONS
from afa.losses.triplet import Triplet


def validate(config: ExperimentConfig) -> None:
    """Checks each field, then combinations of fields.

    Raises:
      UserError: the message names the first invalid field.
    """
    validate_fields(config)
    choose("adversarial.perturbation", config.adversarial.perturbation, PERTURBATIONS)
    for wrong, message in COMBINATIONS:
        if wrong(config):
            raise UserError(message(config))


def validate_fields(config: ExperimentConfig) -> None:
    """Checks type and bounds of each field alone.

    Raises:
      UserError: the message names the first invalid field.
    """
    for name, field, value in leaves(config):
        _check_type(name, field.type, value)
        rule = field.metadata.get(KEY)
        if isinstance(rule, Duration):
            _check_duration(name, value, rule)
        else:
            _check_number(name, value, rule or Bounds())


def _check_type(name: str, kind: Any, value: Any) -> None:
    if get_origin(kind) is Literal:
        choose(name, value, dict.fromkeys(get_args(kind)))
        return
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        fits = isinstance(value, tuple) and all(_is_a(each, inner) for each in value)
        kind = tuple
    else:
        fits = _is_a(value, kind)
    if not fits:
        raise UserError(f"{name}={value!r} {KINDS[kind]}")


def _is_a(value: Any, kind: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _check_number(name: str, value: Any, bounds: Bounds) -> None:
    values = value if isinstance(value, tuple) else (value,)
    numbers = [each for each in values if isinstance(each, int | float)]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{name}={value!r} must be finite")
    if not all(map(bounds.contains, numbers)):
        raise UserError(f"{name}={value!r} {bounds}")
    if bounds.unique and len(set(values)) < len(values):
        twice = next(each for each in values if values.count(each) > 1)
        raise UserError(f"{name}={value!r} has {twice!r} more than once")
    if bounds.lengths and len(values) not in bounds.lengths:
        allowed = " or ".join(map(str, bounds.lengths))
        raise UserError(f"{name}={value!r} must have {allowed} values")


def _check_duration(name: str, value: str, rule: Duration) -> None:
    steps_of(name, value, total=1, epoch=1)  # raises for invalid text
    if not value.endswith("%"):
        return
    if not rule.share:
        raise UserError(f'{name}={value!r} must not be a percentage (allowed: "500", "20ep")')
    if rule.most is not None and float(value.removesuffix("%")) > rule.most:
        raise UserError(f"{name}={value!r} must be at most {rule.most:g}%")


# ---- combinations of fields ----------------------------------------------------------------------


def has_generator(config: ExperimentConfig) -> bool:
    """Whether G and D are part of the run."""
    return config.adversarial.enabled and config.adversarial.generator


def _restores_images(config: ExperimentConfig) -> bool:
    return has_generator(config) and config.generator.name != "features"


def _downsampling(config: ExperimentConfig) -> int:
    """Factor of G and D that the image size must be a multiple of."""
    return 2 ** max(config.generator.levels, config.discriminator.levels)


def _weights_of_generator(config: ExperimentConfig) -> tuple[float, ...]:
    c = config.adversarial
    return (
        c.lambda_reconstruction,
        c.lambda_adversarial,
        c.lambda_features,
        c.lambda_noise,
        c.lambda_code,
    )


def _never(duration: str) -> bool:
    return steps_of("", duration, total=10**9, epoch=10**9) == 0


def _of_loss(config: ExperimentConfig, field: str) -> Any:
    return getattr(config.loss, field)  # a field that not every loss has


def _which_folds(config: ExperimentConfig) -> str:
    folds = config.data.folds
    return f"0 to {folds - 1}" if folds else "0, as data.folds=0"


# (whether the combination is invalid, error message)
COMBINATIONS: tuple[
    tuple[Callable[[ExperimentConfig], bool], Callable[[ExperimentConfig], str]], ...
] = (
    (
        lambda c: c.data.folds == 1,
        lambda c: "data.folds=1 must be 2 or more, or 0 (no cross-validation)",
    ),
    (
        lambda c: c.data.fold >= max(c.data.folds, 1),
        lambda c: f"data.fold={c.data.fold} is out of range (allowed: {_which_folds(c)})",
    ),
    (
        lambda c: _restores_images(c) and c.data.image_size % _downsampling(c) != 0,
        lambda c: (
            f"data.image_size={c.data.image_size} must be a multiple of {_downsampling(c)} "
            "(2**max(generator.levels, discriminator.levels))"
        ),
    ),
    (
        lambda c: has_generator(c) and not any(_weights_of_generator(c)),
        lambda c: (
            "adversarial.lambda_reconstruction, .lambda_adversarial, .lambda_features, "
            ".lambda_noise and .lambda_code are all 0: G has no loss (set one, or "
            "adversarial.generator=False)"
        ),
    ),
    (
        lambda c: c.adversarial.generated_views > 0 and not has_generator(c),
        lambda c: (
            f"adversarial.generated_views={c.adversarial.generated_views} needs a generator "
            "(adversarial.enabled=True and adversarial.generator=True)"
        ),
    ),
    (
        lambda c: c.adversarial.generated_views > 0 and c.train.schedule == "staged",
        lambda c: (
            f"adversarial.generated_views={c.adversarial.generated_views} needs "
            "train.schedule='joint': a staged run trains F before G"
        ),
    ),
    (
        lambda c: c.generator.batch_size > 0 and c.train.schedule == "joint" and has_generator(c),
        lambda c: (
            f"generator.batch_size={c.generator.batch_size} needs train.schedule='staged': a joint "
            "step gives F, G and D the same batch"
        ),
    ),
    (
        lambda c: c.backbone.frozen_norm and c.backbone.weights == RANDOM,
        lambda c: (
            "backbone.frozen_norm=True needs weights with stored statistics, and "
            f"backbone.weights={RANDOM!r}"
        ),
    ),
    (
        lambda c: not c.evaluation.severities,
        lambda c: "evaluation.severities=() must be some of 1, 2, 3, 4, 5",
    ),
    (
        lambda c: c.evaluation.checkpoint == "best" and _never(c.train.evaluate_every),
        lambda c: (
            "evaluation.checkpoint='best' needs evaluations during training, and "
            f"train.evaluate_every={c.train.evaluate_every!r} disables them"
        ),
    ),
    (
        lambda c: c.evaluation.checkpoint == "best" and c.train.keep_best == 0,
        lambda c: "evaluation.checkpoint='best' needs train.keep_best above 0",
    ),
    (
        lambda c: c.launch.index >= c.launch.processes,
        lambda c: (
            f"launch.index={c.launch.index} must be below launch.processes={c.launch.processes}"
        ),
    ),
    (
        lambda c: isinstance(c.loss, Triplet) and c.loss.cutoff >= c.loss.upper_bound,
        lambda c: (
            f"loss.cutoff={_of_loss(c, 'cutoff')} must be below "
            f"loss.upper_bound={_of_loss(c, 'upper_bound')}"
        ),
    ),
)  # fmt: skip

# ---- settings without effect ---------------------------------------------------------------------


def _without(config: ExperimentConfig) -> str:
    """The setting that disables G."""
    off = "generator" if config.adversarial.enabled else "enabled"
    return f"adversarial.{off}=False"


GENERATOR_FIELDS = (
    "generator.", "discriminator.", "adversarial.lambda_", "adversarial.r1",
    "adversarial.diffaugment", "optim.generator_learning_rate",
    "optim.discriminator_learning_rate", "train.generator_steps",
)  # fmt: skip
FEATURE_FIELDS = ("adversarial.feature_", "adversarial.perturbation", "train.plain")

# (prefixes of field names, whether they are unused, the setting that disables them)
UNUSED: tuple[
    tuple[
        tuple[str, ...],
        Callable[[ExperimentConfig], bool],
        Callable[[ExperimentConfig], str],
    ],
    ...,
] = (
    (GENERATOR_FIELDS, lambda c: not has_generator(c), _without),
    (
        ("generator.levels", "adversarial.diffaugment"),
        lambda c: not _restores_images(c),
        lambda c: f"generator.name={c.generator.name!r}",
    ),
    (FEATURE_FIELDS, lambda c: not c.adversarial.enabled, lambda c: "adversarial.enabled=False"),
    (
        ("adversarial.perturbation", "train.plain"),
        lambda c: c.adversarial.feature_epsilon == 0,
        lambda c: "adversarial.feature_epsilon=0",
    ),
    (("data.family_probability",), lambda c: not c.data.family, lambda c: "data.family=''"),
    (("adversarial.r1_every",), lambda c: c.adversarial.r1 == 0, lambda c: "adversarial.r1=0"),
    (
        ("train.generator_steps",),
        lambda c: c.train.schedule == "joint",
        lambda c: "train.schedule='joint'",
    ),
    (
        ("train.small_size",),
        lambda c: _never(c.train.small_steps),
        lambda c: f"train.small_steps={c.train.small_steps!r}",
    ),
    (
        ("loss.cutoff", "loss.upper_bound"),
        lambda c: isinstance(c.loss, Triplet) and c.loss.mining != "distance_weighted",
        lambda c: f"loss.mining={_of_loss(c, 'mining')!r}",
    ),
)


def refuse_unread(config: ExperimentConfig, context: ExperimentConfig) -> None:
    """Refuses changes of a recipe that have no effect, such as settings of G in a run without G.

    Fields set by the recipe itself may be unused: a recipe without its adversarial part is a
    baseline.

    Raises:
      UserError: the message names the first such field and the setting that disables it.
    """
    # Settings of another loss than the recipe's are compared with their defaults.
    before = flatten(with_changes(context, **{LOSS_NAME: config.loss.name}))
    for name, value in flatten(config).items():
        if before.get(name, value) == value:
            continue
        for prefixes, unused, reason in UNUSED:
            if name.startswith(prefixes) and unused(config):
                raise UserError(f"{name}={value!r} has no effect with {reason(config)}")
