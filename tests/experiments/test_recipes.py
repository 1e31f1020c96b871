"""Experiments fine-tune published weights at full scale, and train from scratch otherwise; those of
EfficientNet-Lite always fine-tune."""

import pytest

from afa.config import FINE_TUNING, RANDOM, ExperimentConfig, flatten
from afa.models.backbones import member
from afa.models.pretrained import files
from experiments import configs
from experiments import run as command

EXPERIMENTS = [name for name in configs.names() if name != "debug"]
FINE_TUNED = [name for name in EXPERIMENTS if name.endswith("_efficientnet_lite0")]
DEFAULTS = flatten(ExperimentConfig())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_full_scale_fine_tunes(name):
    full = flatten(configs.find(name)(False))
    weights = full["backbone.weights"]
    assert weights.startswith(("hf://", "pip://")) or weights.endswith(".pth")
    assert all(full[field] != DEFAULTS[field] for field in FINE_TUNING)


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - set(FINE_TUNED)))
def test_laptop_scale_trains_from_scratch(name):
    laptop = flatten(configs.find(name)(True))
    assert laptop["backbone.weights"] == RANDOM
    assert all(laptop[field] == DEFAULTS[field] for field in FINE_TUNING)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_weights_of_a_package_are_fine_tuned_at_both_scales(name):
    full, laptop = (flatten(configs.find(name)(small)) for small in (False, True))
    for field in ("backbone.weights", *FINE_TUNING):
        assert laptop[field] == full[field]
    line = [f"--exp={name}", "--scale=laptop", "--backbone.weights=random"]
    scratch = flatten(command.parse(line))
    assert all(scratch[field] == DEFAULTS[field] for field in FINE_TUNING)


def test_one_flag_trains_from_scratch():
    """Settings for published weights are reset; explicit settings are kept."""
    line = ["--exp=afa_resnet50_cub", "--scale=full"]
    given = flatten(command.parse([*line, "--backbone.weights=random"]))
    assert all(given[name] == DEFAULTS[name] for name in FINE_TUNING)
    assert given["backbone.weights"] == RANDOM and given["train.steps"] == "60ep"
    given = flatten(
        command.parse([*line, "--backbone.weights=random", "--optim.backbone_rate=0.5"])
    )
    assert given["optim.backbone_rate"] == 0.5
    assert flatten(command.parse([*line, "--backbone.weights=w.pth"]))["optim.backbone_rate"] == 0.1


@pytest.mark.parametrize(
    "name",
    ["afa_resnet50", "afa_resnet50_cub", "afa_resnet50_cars", "afa_resnet50_sop",
     "baseline_resnet50", "afa_resnet18", "afa_squeezenet", "afa_bn_inception"],
)  # fmt: skip
def test_missing_weights_are_an_error_with_advice(name, tmp_path, monkeypatch, capsys):
    def missing(source):
        raise files.Missing(f"backbone.weights={source!r} is not here")

    monkeypatch.setattr(files, "_download", missing)
    monkeypatch.chdir(tmp_path)
    assert command.main([f"--exp={name}", "--scale=full"]) == 2
    message = capsys.readouterr().err
    chosen = configs.find(name)(False).backbone
    assert message.count("\n") == 1
    assert message.startswith(f"error: backbone.weights='{chosen.weights}' ")
    assert (
        f"get the weights of {chosen.name}, published as {member(chosen.name).source}, " in message
    )
    assert message.endswith("or train from scratch with --backbone.weights=random\n")
    assert not list(tmp_path.iterdir())


def test_empty_weights_are_an_error(tmp_path, capsys):
    line = ["--exp=debug", "--backbone.weights=", f"--workdir={tmp_path / 'run'}"]
    assert command.main(line) == 2
    assert capsys.readouterr().err == (
        "error: backbone.weights='' is empty (to train from scratch: random)\n"
    )
