"""Configuration: durations, changes, storing, comparison, invalid values."""

import dataclasses

import pytest

from afa import checks
from afa import config as configuration
from afa.bounds import Bounds
from afa.config import ExperimentConfig, steps_of, with_changes
from afa.errors import UserError
from afa.losses import LOSSES


def changed(**fields):
    return with_changes(ExperimentConfig(), **fields)


# ---- durations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("500", 500), ("0", 0), ("20ep", 140), ("0.5ep", 4), ("40%", 80), ("0%", 0), ("100%", 200),
     ("150%", 300), ("12.4", 12)],
)  # fmt: skip
def test_durations_in_steps_epochs_and_percent(duration, steps):
    assert steps_of("train.steps", duration, total=200, epoch=7) == steps


@pytest.mark.parametrize("duration", ["", "soon", "-3", "5 epochs", "%", "ep", "nan", "inf", "-1%"])
def test_invalid_durations_are_refused(duration):
    with pytest.raises(UserError) as caught:
        steps_of("train.steps", duration, total=200, epoch=7)
    assert str(caught.value) == (
        f'train.steps={duration!r} is not a duration (allowed: "500", "20ep", "40%")'
    )


# ---- changes -----------------------------------------------------------------------------------


def test_with_changes_changes_only_the_given_fields():
    before = ExperimentConfig()
    after = with_changes(before, **{"data.image_size": 64, "seed": 3, "data.batch_size": 8})
    assert (after.data.image_size, after.data.batch_size, after.seed) == (64, 8, 3)
    assert before == ExperimentConfig()
    assert with_changes(after, **{"data.image_size": 224, "seed": 0, "data.batch_size": 64}) == (
        before
    )


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("data.image_sise", "data.image_sise is not a field; did you mean 'data.image_size'?"),
        ("dada.image_size", "dada.image_size is not a field; did you mean 'data.image_size'?"),
        ("seed.zz", "seed.zz is not a field; did you mean 'seed'?"),
        ("zzz", "zzz is not a field"),
    ],
)
def test_with_changes_refuses_unknown_fields(field, message):
    with pytest.raises(UserError) as caught:
        changed(**{field: 1})
    assert str(caught.value) == message


def test_every_field_is_stored_and_read_back():
    config = changed(**{
        "data.corruptions": ("occlusion",), "evaluation.severities": (2, 4), "evaluation.views": (),
        "optim.learning_rate": 0.1, "train.steps": "7ep", "adversarial.enabled": False,
    })  # fmt: skip
    stored = configuration.to_dict(config)
    assert configuration.from_dict(stored) == config
    assert stored["data"]["corruptions"] == ["occlusion"]


def test_stored_configuration_may_lack_fields_but_not_have_unknown_ones():
    stored = configuration.to_dict(changed(seed=9))
    del stored["adversarial"]["perturbation"]
    del stored["retrieval"]
    assert configuration.from_dict(stored) == changed(seed=9)
    stored["data"]["colour"] = "red"
    with pytest.raises(
        UserError, match="stored configuration: 'colour' is not a field of DataConfig"
    ):
        configuration.from_dict(stored)


def test_flatten_names_every_leaf_once():
    flat = configuration.flatten(ExperimentConfig())
    assert flat["data.image_size"] == 224
    assert not any(dataclasses.is_dataclass(value) for value in flat.values())
    assert {name.split(".")[0] for name in flat} == {
        field.name for field in dataclasses.fields(ExperimentConfig)
    }


# ---- resuming ----------------------------------------------------------------------------------


def test_differences_name_fields_that_affect_the_result():
    stored = ExperimentConfig()
    assert configuration.differences(stored, stored) == []
    now = changed(**{"seed": 1, "optim.name": "sgd", "data.corruptions": ("occlusion",)})
    assert configuration.differences(stored, now) == [
        "seed: 0 -> 1",
        f"data.corruptions: {configuration.TRAINED_CORRUPTIONS!r} -> ('occlusion',)",
        "optim.name: 'adamw' -> 'sgd'",
    ]


def test_resumable_fields_may_change():
    now = changed(**{
        "launch.processes": 2, "train.parallel": "shard_map", "data.cache": "elsewhere",
        "data.read_threads": 5, "train.log_every": "3", "retrieval.results": 3,
        "evaluation.batch_size": 7,
    })  # fmt: skip
    assert configuration.differences(ExperimentConfig(), now) == []


def test_resumable_fields_exist():
    names = configuration.flatten(ExperimentConfig())
    for prefix in configuration.RESUMABLE:
        assert any(name.startswith(prefix) for name in names), prefix


# ---- invalid values ----------------------------------------------------------------------------


def test_defaults_are_valid():
    checks.validate(ExperimentConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.batch_size": 0}, "data.batch_size=0 must be above 0"),
        ({"optim.learning_rate": -0.1}, "optim.learning_rate=-0.1 must be above 0"),
        ({"optim.accumulate": 0}, "optim.accumulate=0 must be above 0"),
        ({"loss.temperature": 0.0}, "loss.temperature=0.0 must be above 0"),
        ({"loss.temperature": float("nan")}, "loss.temperature=nan must be finite"),
        ({"adversarial.r1_every": 0}, "adversarial.r1_every=0 must be above 0"),
        ({"optim.clip": -1.0}, "optim.clip=-1.0 must not be negative"),
        ({"optim.backbone_rate": -1.0}, "optim.backbone_rate=-1.0 must not be negative"),
        (
            {"backbone.mean": (0.5,)},
            "backbone.mean=(0.5,) must have 0 or 3 values",
        ),
        ({"backbone.std": (1.0, 0.0, 1.0)}, "backbone.std=(1.0, 0.0, 1.0) must be above 0"),
        ({"train.small_size": 0}, "train.small_size=0 must be above 0"),
        ({"data.crop_fraction": 0.0}, "data.crop_fraction=0.0 must lie in (0, 1]"),
        ({"data.crop_fraction": 1.1}, "data.crop_fraction=1.1 must lie in (0, 1]"),
        (
            {"data.corrupt_probability": 1.5},
            "data.corrupt_probability=1.5 must lie in [0, 1]",
        ),
        ({"generator.blocks": 0}, "generator.blocks=0 must be above 0"),
        ({"generator.batch_size": -1}, "generator.batch_size=-1 must not be negative"),
        ({"adversarial.lambda_code": -1.0}, "adversarial.lambda_code=-1.0 must not be negative"),
        (
            {"generator.corrupt_probability": 2.0},
            "generator.corrupt_probability=2.0 must lie in [0, 1]",
        ),
        (
            {"train.schedule": "joint", "generator.batch_size": 8},
            "generator.batch_size=8 needs train.schedule='staged': a joint step gives F, G and D "
            "the same batch",
        ),
        ({"optim.ema_decay": 1.0}, "optim.ema_decay=1.0 must lie in [0, 1)"),
        (
            {"data.image_size": 72},
            "data.image_size=72 must be a multiple of 16 (2**max(generator.levels, "
            "discriminator.levels))",
        ),
        ({"data.folds": 1}, "data.folds=1 must be 2 or more, or 0 (no cross-validation)"),
        ({"data.folds": -2}, "data.folds=-2 must not be negative"),
        (
            {"data.folds": 4, "data.fold": 4},
            "data.fold=4 is out of range (allowed: 0 to 3)",
        ),
        ({"data.fold": 1}, "data.fold=1 is out of range (allowed: 0, as data.folds=0)"),
        (
            {"evaluation.severities": (0, 3)},
            "evaluation.severities=(0, 3) must lie in [1, 5]",
        ),
    ],
)
def test_invalid_values_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        checks.validate(changed(**fields))
    assert str(caught.value) == message


def test_any_image_size_is_allowed_without_generator():
    checks.validate(changed(**{"data.image_size": 70, "adversarial.generator": False}))
    checks.validate(changed(**{"data.image_size": 70, "adversarial.enabled": False}))


# ---- bounds of every field -----------------------------------------------------------------------

# Types without bounds: switches, and texts, which other modules check by name.
FREE = (str, bool)


def bounded_fields():
    """Returns field name -> bounds."""
    return {
        name: field.metadata["bounds"]
        for name, field, _ in configuration.leaves(ExperimentConfig())
        if isinstance(field.metadata.get("bounds"), Bounds)
    }


def test_every_number_has_bounds():
    """Without bounds, negative weights or sizes would be accepted."""
    for name, _, value in configuration.leaves(ExperimentConfig()):
        values = value if isinstance(value, tuple) else (value,)
        if values and not isinstance(values[0], FREE):
            assert name in bounded_fields(), name
    assert len(bounded_fields()) > 50


@pytest.mark.parametrize(("name", "bounds"), bounded_fields().items())
def test_values_at_and_beyond_a_bound(name, bounds):
    """The smallest and largest allowed values are accepted, the next ones are not."""
    value = configuration.flatten(ExperimentConfig())[name]
    many = isinstance(value, tuple)
    kind = type((value or (0.5,))[0] if many else value)
    if kind is str:
        return

    def refused(number):
        given = (kind(number),) * (3 if 3 in bounds.lengths else 1) if many else kind(number)
        try:
            checks.validate(changed(**{name: given}))
        except UserError as error:
            assert "\n" not in str(error)
            return str(error) == f"{name}={given!r} {bounds}"
        return False

    step = 1 if kind is int else 1e-6
    for limit, sign in ((bounds.least, -1), (bounds.most, 1)):
        if limit is not None:
            assert refused(limit + sign * step)
            assert not refused(limit)
    for limit, sign in ((bounds.above, 1), (bounds.below, -1)):
        if limit is not None:
            assert refused(limit)
            assert not refused(limit + sign * step)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_in_every_field(number):
    for name, _, value in configuration.leaves(ExperimentConfig()):
        if isinstance(value, float) or name in ("backbone.mean", "backbone.std"):
            given = value.__class__((number,) * 3) if isinstance(value, tuple) else number
            with pytest.raises(UserError) as caught:
                checks.validate(changed(**{name: given}))
            assert str(caught.value) == f"{name}={given!r} must be finite"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed=-1 must lie in [0, 4294967295]"),
        ({"seed": 2**32}, "seed=4294967296 must lie in [0, 4294967295]"),
        ({"data.split_seed": -1}, "data.split_seed=-1 must lie in [0, 4294967295]"),
        ({"adversarial.lambda_code": -1.0}, "adversarial.lambda_code=-1.0 must not be negative"),
        ({"embedder.gem_power": 0.0}, "embedder.gem_power=0.0 must be above 0"),
        (
            {"optim.generator_learning_rate": -1e-4},
            "optim.generator_learning_rate=-0.0001 must be above 0",
        ),
        ({"loss.local_weight": -1.0}, "loss.local_weight=-1.0 must not be negative"),
        (
            {"evaluation.views": ("flip", "median", "flip")},
            "evaluation.views=('flip', 'median', 'flip') has 'flip' more than once",
        ),
        (
            {"data.corruptions": ("occlusion", "occlusion")},
            "data.corruptions=('occlusion', 'occlusion') has 'occlusion' more than once",
        ),
        ({"evaluation.severities": (2, 2)}, "evaluation.severities=(2, 2) has 2 more than once"),
        ({"evaluation.severities": ()}, "evaluation.severities=() must be some of 1, 2, 3, 4, 5"),
    ],
)
def test_more_invalid_values_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        checks.validate(changed(**fields))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.batch_size", 8.0, "is not a whole number"),
        ("data.batch_size", True, "is not a whole number"),
        ("optim.clip", "1", "is not a number"),
        ("train.steps", 100, "is not text"),
        ("data.flip", 1, "is neither True nor False"),
        ("evaluation.views", ["flip"], "is not a list of values separated by spaces"),
        ("train.schedule", "jont",
         "is unknown; did you mean 'joint'? (allowed: joint, staged)"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(field, value, message):
    """As a notebook may pass them; set with object.__setattr__, because tests check types."""
    head, _, last = field.partition(".")
    config = ExperimentConfig()
    part = dataclasses.replace(getattr(config, head))
    object.__setattr__(part, last, value)
    object.__setattr__(config, head, part)
    with pytest.raises(UserError) as caught:
        checks.validate(config)
    assert str(caught.value) == f"{field}={value!r} {message}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"train.steps": "40%"},
            'train.steps=\'40%\' must not be a percentage (allowed: "500", "20ep")',
        ),
        ({"optim.warmup": "200%"}, "optim.warmup='200%' must be at most 100%"),
        ({"optim.head_warmup": "101%"}, "optim.head_warmup='101%' must be at most 100%"),
        ({"train.plain": "150%"}, "train.plain='150%' must be at most 100%"),
        ({"train.small_steps": "150%"}, "train.small_steps='150%' must be at most 100%"),
        (
            {"train.log_every": "now"},
            'train.log_every=\'now\' is not a duration (allowed: "500", "20ep", "40%")',
        ),
    ],
)
def test_duration_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        checks.validate(changed(**fields))
    assert str(caught.value) == message
    checks.validate(changed(**{"train.generator_steps": "150%", "optim.warmup": "100%"}))


# ---- combinations of fields ----------------------------------------------------------------------

JOINT = {"train.schedule": "joint", "adversarial.generated_views": 0.5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"adversarial.generated_views": 0.5},
            "adversarial.generated_views=0.5 needs train.schedule='joint': a staged run trains F "
            "before G",
        ),
        (
            JOINT | {"adversarial.generator": False},
            "adversarial.generated_views=0.5 needs a generator (adversarial.enabled=True and "
            "adversarial.generator=True)",
        ),
        (
            JOINT | {"adversarial.enabled": False},
            "adversarial.generated_views=0.5 needs a generator (adversarial.enabled=True and "
            "adversarial.generator=True)",
        ),
        (
            {f"adversarial.lambda_{name}": 0.0
             for name in ("reconstruction", "adversarial", "features", "noise", "code")},
            "adversarial.lambda_reconstruction, .lambda_adversarial, .lambda_features, "
            ".lambda_noise and .lambda_code are all 0: G has no loss (set one, or "
            "adversarial.generator=False)",
        ),
        (
            {"evaluation.checkpoint": "best", "train.evaluate_every": "0"},
            "evaluation.checkpoint='best' needs evaluations during training, "
            "and train.evaluate_every='0' disables them",
        ),
        (
            {"evaluation.checkpoint": "best", "train.keep_best": 0},
            "evaluation.checkpoint='best' needs train.keep_best above 0",
        ),
        (
            {"launch.index": 2, "launch.processes": 2},
            "launch.index=2 must be below launch.processes=2",
        ),
        (
            {"loss.name": "triplet", "loss.cutoff": 1.4},
            "loss.cutoff=1.4 must be below loss.upper_bound=1.4",
        ),
    ],
)  # fmt: skip
def test_invalid_combinations_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        checks.validate(changed(**fields))
    assert str(caught.value) == message
    checks.validate(changed(**JOINT))


# ---- settings without effect ---------------------------------------------------------------------


def test_an_unknown_perturbation_is_refused_before_training():
    with pytest.raises(UserError, match=r"adversarial.perturbation='gradiant'.*mean 'gradient'"):
        checks.validate(changed(**{"adversarial.perturbation": "gradiant"}))


OFF, NO_G = {"adversarial.enabled": False}, {"adversarial.generator": False}
FEATURES = {"generator.name": "features"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (OFF | {"generator.width": 8}, "generator.width=8 has no effect with "
         "adversarial.enabled=False"),
        (NO_G | {"discriminator.spectral_norm": True}, "discriminator.spectral_norm=True has no "
         "effect with adversarial.generator=False"),
        (NO_G | {"adversarial.lambda_code": 1.0}, "adversarial.lambda_code=1.0 has no effect with "
         "adversarial.generator=False"),
        (NO_G | {"optim.generator_learning_rate": 1e-3}, "optim.generator_learning_rate=0.001 "
         "has no effect with adversarial.generator=False"),
        (NO_G | {"train.generator_steps": "3"}, "train.generator_steps='3' has no effect with "
         "adversarial.generator=False"),
        (OFF | {"adversarial.perturbation": "random"}, "adversarial.perturbation='random' has no "
         "effect with adversarial.enabled=False"),
        ({"data.family_probability": 0.3}, "data.family_probability=0.3 has no effect with "
         "data.family=''"),
        (OFF | {"adversarial.feature_epsilon": 0.1}, "adversarial.feature_epsilon=0.1 has no "
         "effect with adversarial.enabled=False"),
        ({"adversarial.feature_epsilon": 0.0, "train.plain": "10%"}, "train.plain='10%' has no "
         "effect with adversarial.feature_epsilon=0"),
        ({"adversarial.r1": 0.0, "adversarial.r1_every": 2}, "adversarial.r1_every=2 has no "
         "effect with adversarial.r1=0"),
        ({"train.schedule": "joint", "train.generator_steps": "3"}, "train.generator_steps='3' "
         "has no effect with train.schedule='joint'"),
        (FEATURES | {"generator.levels": 2}, "generator.levels=2 has no effect with "
         "generator.name='features'"),
        (FEATURES | {"adversarial.diffaugment": False}, "adversarial.diffaugment=False has no "
         "effect with generator.name='features'"),
        ({"train.small_size": 16}, "train.small_size=16 has no effect with "
         "train.small_steps='0'"),
        ({"loss.name": "triplet", "loss.cutoff": 0.3}, "loss.cutoff=0.3 has no effect with "
         "loss.mining='hard'"),
        ({"loss.name": "triplet", "loss.mining": "semi_hard", "loss.upper_bound": 1.3},
         "loss.upper_bound=1.3 has no effect with loss.mining='semi_hard'"),
    ],
)  # fmt: skip
def test_changes_without_effect_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        checks.refuse_unread(changed(**fields), ExperimentConfig())
    assert str(caught.value) == message


def test_unused_fields_of_a_recipe_are_allowed():
    """A recipe without its adversarial part is a baseline."""
    context = changed(**{"generator.width": 8, "train.generator_steps": "3"})
    checks.refuse_unread(with_changes(context, **OFF), context)
    checks.refuse_unread(with_changes(context, **NO_G, **{"generator.width": 8}), context)
    checks.refuse_unread(changed(**{"generator.width": 9, "adversarial.r1": 0.0}), context)


# ---- the settings of a loss ----------------------------------------------------------------------


def test_new_loss_has_its_published_settings():
    before = changed(**{"loss.temperature": 0.1, "loss.local_weight": 0.25})
    after = with_changes(before, **{"loss.margin": 0.3, "loss.name": "arcface"})
    assert configuration.to_dict(after)["loss"] == {
        "name": "arcface", "local_weight": 0.25, "fused_weight": 0.5, "scale": 64.0, "margin": 0.3,
        "centres": 1,
    }  # fmt: skip
    assert configuration.from_dict(configuration.to_dict(after)) == after
    assert with_changes(before, **{"loss.name": "norm_softmax"}) == before
    assert configuration.differences(before, after) == ["loss.name: 'norm_softmax' -> 'arcface'"]
    other = with_changes(after, **{"loss.scale": 32.0})
    assert configuration.differences(after, other) == ["loss.scale: 64.0 -> 32.0"]


def test_a_setting_of_another_loss_is_refused():
    with pytest.raises(UserError) as caught:
        changed(**{"loss.margin": 0.3})
    assert str(caught.value) == (
        "loss.margin is not a field of loss.name='norm_softmax'; did you mean 'loss.name'? "
        "(allowed: loss.name, loss.local_weight, loss.fused_weight, loss.temperature)"
    )
    with pytest.raises(UserError, match="'scale' is not a field of Triplet"):
        configuration.from_dict({"loss": {"name": "triplet", "scale": 3.0}})


@pytest.mark.parametrize("name", LOSSES)
def test_every_setting_of_a_loss_has_bounds(name):
    config = changed(**{"loss.name": name})
    checks.validate(config)
    for field, rule, value in configuration.leaves(config):
        if field.startswith("loss.") and isinstance(value, int | float):
            assert isinstance(rule.metadata.get("bounds"), Bounds), field
        if field.startswith("loss.") and isinstance(value, float):
            with pytest.raises(UserError, match=f"{field}=nan must be finite"):
                checks.validate(with_changes(config, **{field: float("nan")}))
