"""Recipes at full scale name their published weights; laptop scale, and one flag, do without."""

import pytest

from afa.config import FINE_TUNING, RANDOM, ExperimentConfig, flatten
from afa.models.backbones import member
from afa.models.pretrained import files
from experiments import configs
from experiments import run as command

RECIPES = [name for name in configs.names() if name != "debug"]
USUAL = flatten(ExperimentConfig())


@pytest.mark.parametrize("name", RECIPES)
def test_full_scale_fine_tunes_and_laptop_scale_does_not(name):
    full, laptop = (flatten(configs.find(name)(small)) for small in (False, True))
    assert full["backbone.weights"].startswith("hf://") or full["backbone.weights"].endswith(".pth")
    assert all(full[field] != USUAL[field] for field in FINE_TUNING)
    assert laptop["backbone.weights"] == RANDOM
    assert all(laptop[field] == USUAL[field] for field in FINE_TUNING)


def test_one_flag_trains_from_scratch():
    """What goes with published weights is taken back; what is said beside it holds."""
    line = ["--exp=afa_resnet50_cub", "--scale=full"]
    told = flatten(command.parse([*line, "--backbone.weights=random"]))
    assert {name: told[name] for name in FINE_TUNING} == {name: USUAL[name] for name in FINE_TUNING}
    assert told["backbone.weights"] == RANDOM and told["train.steps"] == "60ep"
    told = flatten(command.parse([*line, "--backbone.weights=random", "--optim.backbone_rate=0.5"]))
    assert told["optim.backbone_rate"] == 0.5
    assert flatten(command.parse([*line, "--backbone.weights=w.pth"]))["optim.backbone_rate"] == 0.1


@pytest.mark.parametrize(
    "name",
    ["afa_resnet50", "afa_resnet50_cub", "afa_resnet50_cars", "afa_resnet50_sop",
     "baseline_resnet50", "afa_resnet18", "afa_squeezenet", "afa_bn_inception"],
)  # fmt: skip
def test_without_the_file_one_line_says_what_to_get(name, tmp_path, monkeypatch, capsys):
    def gone(source):
        raise files.Missing(f"backbone.weights={source!r} is not here")

    monkeypatch.setattr(files, "_download", gone)
    monkeypatch.chdir(tmp_path)
    assert command.main([f"--exp={name}", "--scale=full"]) == 2
    told = capsys.readouterr().err
    chosen = configs.find(name)(False).backbone
    assert told.count("\n") == 1 and told.startswith(f"error: backbone.weights='{chosen.weights}' ")
    assert f"get the weights of {chosen.name}, published as {member(chosen.name).source}, " in told
    assert told.endswith("or train from scratch with --backbone.weights=random\n")
    assert not list(tmp_path.iterdir())


def test_no_weights_at_all_are_said_to_be_random(tmp_path, capsys):
    line = ["--exp=debug", "--backbone.weights=", f"--workdir={tmp_path / 'run'}"]
    assert command.main(line) == 2
    assert capsys.readouterr().err == (
        "error: backbone.weights='' is empty (to train from scratch: random)\n"
    )
