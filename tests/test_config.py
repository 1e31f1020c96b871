"""Configuration: durations, changes, storing, comparing, refusing."""

import dataclasses

import pytest

from afa import config as configuration
from afa.config import ExperimentConfig, steps_of, with_changes
from afa.errors import UserError


def changed(**fields):
    return with_changes(ExperimentConfig(), **fields)


# ---- durations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "steps"),
    [("500", 500), ("0", 0), ("20ep", 140), ("0.5ep", 4), ("40%", 80), ("0%", 0), ("100%", 200),
     ("150%", 300), ("12.4", 12)],
)  # fmt: skip
def test_durations_in_steps_epochs_and_percent(duration, steps):
    assert steps_of("train.steps", duration, whole=200, epoch=7) == steps


@pytest.mark.parametrize("duration", ["", "soon", "-3", "5 epochs", "%", "ep", "nan", "inf", "-1%"])
def test_what_is_no_duration_is_refused(duration):
    with pytest.raises(UserError) as caught:
        steps_of("train.steps", duration, whole=200, epoch=7)
    assert str(caught.value) == (
        f'train.steps={duration!r} is no duration (allowed: "500", "20ep", "40%")'
    )


# ---- changes -----------------------------------------------------------------------------------


def test_with_changes_reaches_nested_fields_and_leaves_the_rest():
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
        ("data.image_sise", "data.image_sise is no field; did you mean 'data.image_size'?"),
        ("dada.image_size", "dada.image_size is no field; did you mean 'data.image_size'?"),
        ("seed.zz", "seed.zz is no field; did you mean 'seed'?"),
        ("zzz", "zzz is no field"),
    ],
)
def test_with_changes_refuses_what_is_no_field(field, message):
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


def test_a_stored_configuration_may_lack_new_fields_but_not_hold_unknown_ones():
    stored = configuration.to_dict(changed(seed=9))
    del stored["adversarial"]["gate"]
    del stored["retrieval"]
    assert configuration.from_dict(stored) == changed(seed=9)
    stored["data"]["colour"] = "red"
    with pytest.raises(UserError, match="stored configuration: 'colour' is no field of DataConfig"):
        configuration.from_dict(stored)


def test_flatten_names_every_leaf_once():
    flat = configuration.flatten(ExperimentConfig())
    assert flat["data.image_size"] == 224
    assert not any(dataclasses.is_dataclass(value) for value in flat.values())
    assert {name.split(".")[0] for name in flat} == {
        field.name for field in dataclasses.fields(ExperimentConfig)
    }


# ---- resuming ----------------------------------------------------------------------------------


def test_differences_name_what_decides_a_result():
    stored = ExperimentConfig()
    assert configuration.differences(stored, stored) == []
    now = changed(**{"seed": 1, "optim.name": "sgd", "data.corruptions": ("occlusion",)})
    assert configuration.differences(stored, now) == [
        "seed: 0 -> 1",
        f"data.corruptions: {configuration.TRAINED_CORRUPTIONS!r} -> ('occlusion',)",
        "optim.name: 'adamw' -> 'sgd'",
    ]


def test_where_and_how_fast_a_run_computes_may_change():
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


# ---- refusing ----------------------------------------------------------------------------------


def test_defaults_are_valid():
    configuration.validate(ExperimentConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.batch_size": 0}, "data.batch_size=0 must be above 0"),
        ({"optim.learning_rate": -0.1}, "optim.learning_rate=-0.1 must be above 0"),
        ({"optim.accumulate": 0}, "optim.accumulate=0 must be above 0"),
        ({"loss.temperature": 0.0}, "loss.temperature=0.0 must be above 0"),
        ({"loss.temperature": float("nan")}, "loss.temperature=nan must be above 0"),
        ({"adversarial.r1_every": 0}, "adversarial.r1_every=0 must be above 0"),
        ({"optim.clip": -1.0}, "optim.clip=-1.0 must not be negative"),
        ({"optim.backbone_rate": -1.0}, "optim.backbone_rate=-1.0 must not be negative"),
        (
            {"backbone.mean": (0.5,)},
            "backbone.mean=(0.5,) must have 3 figures, one a channel, or none",
        ),
        ({"backbone.std": (1.0, 0.0, 1.0)}, "backbone.std=(1.0, 0.0, 1.0) must be above 0"),
        ({"train.small_size": 0}, "train.small_size=0 must be above 0"),
        ({"data.crop_fraction": 0.0}, "data.crop_fraction=0.0 must lie in (0, 1]"),
        ({"data.crop_fraction": 1.1}, "data.crop_fraction=1.1 must lie in (0, 1]"),
        (
            {"data.corrupt_probability": 1.5},
            "data.corrupt_probability=1.5 must lie between 0 and 1",
        ),
        ({"generator.blocks": 0}, "generator.blocks=0 must be above 0"),
        ({"generator.batch_size": -1}, "generator.batch_size=-1 must not be negative"),
        ({"adversarial.lambda_mse": -1.0}, "adversarial.lambda_mse=-1.0 must not be negative"),
        (
            {"generator.corrupt_probability": 2.0},
            "generator.corrupt_probability=2.0 must lie between 0 and 1",
        ),
        (
            {"train.schedule": "joint", "generator.batch_size": 8},
            "generator.batch_size=8 needs train.schedule='staged': a joint step gives F, G and D "
            "the same batch",
        ),
        ({"optim.ema_decay": 1.0}, "optim.ema_decay=1.0 must lie in [0, 1)"),
        (
            {"data.image_size": 72},
            "data.image_size=72 must be a multiple of 16, 2 to the larger of generator.levels and "
            "discriminator.levels",
        ),
        ({"data.folds": 1}, "data.folds=1 must be 2 or more, or 0: no cross-validation"),
        ({"data.folds": -2}, "data.folds=-2 must be 2 or more, or 0: no cross-validation"),
        (
            {"data.folds": 4, "data.fold": 4},
            "data.fold=4 is not there (allowed: 0 to 3)",
        ),
        ({"data.fold": 1}, "data.fold=1 is not there (allowed: 0, as data.folds=0)"),
        (
            {"evaluation.severities": (0, 3)},
            "evaluation.severities=(0, 3) must be some of 1, 2, 3, 4, 5",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        configuration.validate(changed(**fields))
    assert str(caught.value) == message


def test_without_a_generator_any_image_size_will_do():
    configuration.validate(changed(**{"data.image_size": 70, "adversarial.generator": False}))
    configuration.validate(changed(**{"data.image_size": 70, "adversarial.enabled": False}))
