"""One complete tiny run through the command line, and its second start."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tfds_mocks
import tiny_run

import afa
from afa.config import ExperimentConfig, differences, flatten, from_dict
from afa.errors import EXIT_DIVERGED, UserError
from afa.evaluation.evaluator import Evaluator
from afa.retrieval import index
from afa.retrieval.export import read_export
from afa.runs import run as job
from afa.runs.tables import search_command
from experiments import configs
from experiments import run as command

HEALTH = {
    "F": {"loss", "metric_loss", "batch_recall", "mean_cosine", "embedder_gradient_norm"},
    "F + perturbation": {
        "loss", "metric_loss", "adversarial_metric_loss", "batch_recall", "mean_cosine",
    },
    "G and D": {
        "loss", "d_real", "d_fake", "discriminator_loss", "r1", "generator_loss",
        "g_reconstruction", "g_adversarial", "g_features", "g_noise", "g_code",
        "psnr_in/clean", "psnr_out/clean", "spread_samples", "spread_images",
        "recall_x", "recall_restored", "recall_fused",
        "generator_gradient_norm", "discriminator_gradient_norm",
    },
}  # fmt: skip
ROWS = [
    "raw pixels", "initial weights", "initial weights, fused", "F", "local", "flip alone",
    "F + flip", "G alone", "F + G", "D features alone", "query G", "query by discriminator",
    "query by confidence", "query by hand_made", "query by random", "fused",
]  # fmt: skip
CLEAN = {
    "recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "map_at_r", "r_precision",
    "mean_average_precision",
}  # fmt: skip


def test_a_run_writes_all_its_files(tiny_finished):
    names = {path.name for path in tiny_finished.iterdir()}
    assert names == {
        ".lock", "config.json", "split.json", "metrics.jsonl", "tensorboard", "checkpoints",
        "embeddings", "result.json", "per_query.parquet", "report.html",
        "test_reads.json",
    }  # fmt: skip
    assert list((tiny_finished / "tensorboard").glob("events.out.tfevents.*"))
    assert not [p for p in tiny_finished.rglob("*") if "tmp" in p.name or "writing" in p.name]


def test_result_has_configuration_and_data(tiny_finished):
    result = tiny_run.result(tiny_finished)
    assert {"config", "commit", "data", "metrics", "timings"} <= result.keys()
    stored = json.loads((tiny_finished / "config.json").read_text())
    assert result["config"] == {"experiment": "debug", **stored["config"]}
    assert result["step"] == tiny_run.STEPS
    split = json.loads((tiny_finished / "split.json").read_text())
    assert result["data"]["fingerprint"] == split["fingerprint"]
    assert result["data"]["protocol"] == split["protocol"]
    classes = [set(each["classes"]) for each in split["splits"].values()]
    assert [len(each) for each in classes] == [4, 2, 6]
    assert len(set.union(*classes)) == 12
    assert set(result["timings"]) == {
        "data", "training", "training_steps", "evaluation", "export", "index", "report",
    }  # fmt: skip
    assert set(result["parameters"]) == {"embedder", "generator", "discriminator"}
    assert result["parameters"]["embedder"] > 1000
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|afa .*", result["commit"])


def test_every_variant_has_every_metric(tiny_finished):
    metrics = tiny_run.result(tiny_finished)["metrics"]
    assert list(metrics["test"]) == ROWS
    for row in metrics["test"].values():
        for protocol in ("leave_one_out", "catalogue"):
            found = row[protocol]
            assert set(found["clean"]) == CLEAN
            assert all(0 <= value <= 1 for value in found["clean"].values())
            assert set(found["trained"]) == set(found["held_back"]) == {"recall_at_1", "map_at_r"}
            assert len(found["corruptions"]) == 10
    assert metrics["test"]["raw pixels"]["cost"] is None
    assert metrics["test"]["F"]["cost"] == 1
    assert metrics["test"]["F + flip"]["cost"] in (1, 2)
    assert metrics["search"]["gallery_size"] == 30
    assert metrics["search"]["recall_at_5"] == 1


def test_log_lines_have_the_health_metrics(tiny_finished):
    lines = tiny_run.lines(tiny_finished)
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [3, 4, 6, 8, 9, 12]
    for line in logged:
        missing = HEALTH[line["stage"]] - line.keys()
        assert not missing
        assert all(np.isfinite(v) for k, v in line.items() if k != "stage")
    kinds = {k.split("/")[1] for line in logged for k in line if k.startswith("psnr_out/")}
    assert kinds <= {"clean", "gaussian_noise", "gaussian_blur", "occlusion", "low_resolution"}
    validated = [line for line in lines if "validation/map_at_r" in line]
    assert [line["step"] for line in validated] == [4, 8, 12]


def test_export_and_index_are_of_the_last_checkpoint(tiny_finished):
    export, manifest = read_export(tiny_finished / "embeddings")
    split = json.loads((tiny_finished / "split.json").read_text())["splits"]["test"]
    assert sorted(export.ids) == sorted(split["ids"])
    assert sorted(set(export.classes)) == split["classes"]
    assert all(path.endswith(name) for path, name in zip(export.paths, export.ids, strict=True))
    assert manifest["checkpoint"].startswith(f"step-{tiny_run.STEPS}-")
    found = index.load(tiny_finished / "embeddings").search(export.vectors, 3)
    assert found.ids[:, 0].tolist() == export.ids.tolist()
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)
    steps = {int(path.name) for path in (tiny_finished / "checkpoints").iterdir()}
    assert tiny_run.STEPS in steps and len(steps) <= 2


def test_per_query_table_has_the_means_of_the_result(tiny_finished):
    table = pyarrow.parquet.read_table(tiny_finished / "per_query.parquet").to_pydict()
    columns = {name: np.array(values) for name, values in table.items()}
    for name, row in tiny_run.result(tiny_finished)["metrics"]["test"].items():
        for protocol in ("leave_one_out", "catalogue"):
            mine = (columns["variant"] == name) & (columns["protocol"] == protocol)
            clean = mine & (columns["corruption"] == "")
            assert clean.sum() == 24
            for figure, value in row[protocol]["clean"].items():
                assert value == pytest.approx(np.nanmean(columns[figure][clean]))
            for corruption, severities in row[protocol]["corruptions"].items():
                for severity, values in severities.items():
                    corrupted = mine & (columns["corruption"] == corruption)
                    corrupted &= columns["severity"] == int(severity)
                    assert corrupted.sum() == 8
                    for figure, value in values.items():
                        assert value == pytest.approx(np.nanmean(columns[figure][corrupted]))


def test_report_opens_without_a_network(tiny_finished):
    page = (tiny_finished / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert loaded
    assert all(each.startswith(("data:", "#")) for each in loaded)
    assert not re.search(r"url\(\s*['\"]?(?!data:|#)", page)
    assert not re.search(r"@import|<script[^>]+src|<link[^>]+stylesheet", page)
    for row in ROWS:
        assert row in page


def test_standard_output_lists_data_metrics_and_files(tiny_finished):
    printed = tiny_finished.with_suffix(".out").read_text()
    assert printed.startswith("debug at laptop scale")
    for part in (
        "hardware ", "class-disjoint: ", "images/s", "ETA", "test classes, leave-one-out",
        "test classes, catalogue", "queries/s", "report.html", "experiments.search",
    ):  # fmt: skip
        assert part in printed
    assert "\x1b" not in printed


def test_a_finished_run_is_only_evaluated_again(tiny_data, tiny_copy, capsys):
    before = tiny_run.listing(tiny_copy / "checkpoints")
    logged = (tiny_copy / "metrics.jsonl").read_bytes()
    expected, digest = tiny_run.figures(tiny_copy), tiny_run.digest(tiny_copy)
    (tiny_copy / "result.json").unlink()
    assert tiny_run.main(*tiny_run.words(tiny_data, tiny_copy)) == 0
    printed = capsys.readouterr().out
    assert f"{tiny_copy} is finished (12 steps); it is evaluated again" in printed
    assert "images/s  ETA" not in printed
    assert tiny_run.figures(tiny_copy) == expected
    assert tiny_run.digest(tiny_copy) == digest
    assert tiny_run.listing(tiny_copy / "checkpoints") == before
    assert (tiny_copy / "metrics.jsonl").read_bytes() == logged


def test_the_best_checkpoint_has_a_trained_generator(tiny_data, tmp_path, monkeypatch):
    """Validation falls all the time here: of the checkpoints of the last stage the first is best,
    and those before it, whose G is untrained, are no candidates although they scored higher."""
    asked = []

    def falling(self, variables, generator=False):
        asked.append(generator)
        return dict.fromkeys(("map_at_r", "recall_at_1"), 1 - len(asked) / 100)

    monkeypatch.setattr(Evaluator, "validation", falling)
    changes = {"evaluation.checkpoint": "best", "train.evaluate_every": 2}
    home = tmp_path / "run"
    assert tiny_run.main(*tiny_run.words(tiny_data, home, **changes)) == 0
    assert asked == [False] * 4 + [True] * 2  # after steps 2, 4, 6, 8; 10, 12
    assert tiny_run.result(home)["step"] == 10
    assert {int(path.name) for path in (home / "checkpoints").iterdir()} == {10, 12}


def test_without_a_generator_every_checkpoint_can_be_the_best(tiny_data, tmp_path, monkeypatch):
    figures = iter((0.2, 0.9, 0.5, 0.4))
    monkeypatch.setattr(
        Evaluator, "validation", lambda *_: dict.fromkeys(("map_at_r",), next(figures))
    )
    train, steps = job.train, []

    def trained(*given):
        found = train(*given)
        steps.append(int(found[0].step))
        raise UserError("enough")

    monkeypatch.setattr(job, "train", trained)
    settings = tiny_run.SETTINGS | {"data.path": str(tiny_data), "adversarial.enabled": False}
    settings |= {"evaluation.checkpoint": "best", "train.evaluate_every": "2", "train.keep_best": 1}
    for of_the_adversarial_part in ("generator.latent_dim", "train.plain"):
        del settings[of_the_adversarial_part]
    with pytest.raises(UserError, match="enough"):
        afa.run(workdir=str(tmp_path / "run"), **settings)
    assert steps == [4]


def test_a_run_as_a_function_without_the_adversarial_part(tiny_data, tmp_path, capsys):
    """The baseline as in a notebook: no generator, fewer variants, the same keys."""
    settings = tiny_run.SETTINGS | {"data.path": str(tiny_data), "adversarial.enabled": False}
    settings |= {"train.keep_best": 1, "train.steps": "4", "retrieval.index": "exact://"}
    for of_the_adversarial_part in ("generator.latent_dim", "train.plain"):
        del settings[of_the_adversarial_part]
    result = afa.run(workdir=str(tmp_path / "run"), **settings)
    assert {"config", "commit", "data", "metrics", "timings"} <= result.keys()
    assert result["step"] == 4
    assert list(result["parameters"]) == ["embedder"]
    assert list(result["metrics"]["test"]) == [
        "raw pixels", "initial weights", "initial weights, fused", "F", "local", "flip alone",
        "F + flip", "fused",
    ]  # fmt: skip
    stages = {line["stage"] for line in tiny_run.lines(tmp_path / "run")}
    assert stages == {"F"}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 4
    assert "G and D" not in (tmp_path / "run" / "report.html").read_text()


# ---- the command line ----------------------------------------------------------------------------


def test_list_names_every_experiment_with_its_purpose(capsys):
    assert tiny_run.main("--exp=list") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == configs.names()
    expected = {
        "afa_resnet18", "afa_resnet50", "afa_resnet50_cars", "afa_resnet50_cub",
        "afa_resnet50_sop", "baseline_resnet18", "baseline_resnet50", "debug",
    }  # fmt: skip
    families = ("vgg16", "densenet121", "inception_v3", "bn_inception", "squeezenet", "vit_s14",
                "efficientnet_lite0")  # fmt: skip
    expected |= {f"{kind}_{name}" for kind in ("afa", "baseline") for name in families}
    assert expected <= set(configs.names())
    for line in printed:
        assert len(line.split(maxsplit=1)[1]) > 20
        assert line.endswith((".", ":")) or line[-1].isalnum()


@pytest.mark.parametrize("name", configs.names())
@pytest.mark.parametrize("laptop", [True, False])
def test_every_experiment_is_a_valid_configuration(name, laptop):
    from afa.checks import validate
    from afa.losses import LOSSES
    from afa.models.networks import build_networks
    from afa.train import loop, optim

    config = configs.find(name)(laptop)
    validate(config)
    assert config.loss.name in LOSSES
    build_networks(config, classes=8)
    plan = loop.plan(config, epoch=10)
    optim.optimisers(config, plan.embedder_steps, max(plan.generator_steps, 1), 10)
    assert plan.total >= plan.embedder_steps >= plan.plain > 0
    assert configs.purpose(name)
    if not name.startswith("baseline_"):
        head = __import__(f"experiments.configs.{name}", fromlist=["_"]).__doc__
        assert f"Command: python -m experiments.run --exp={name}" in head


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("laptop", [True, False])
def test_a_baseline_differs_in_the_adversarial_part_alone(depth, laptop):
    ours = configs.find(f"afa_resnet{depth}")(laptop)
    baseline = configs.find(f"baseline_resnet{depth}")(laptop)
    changed = {k: v for k, v in flatten(baseline).items() if v != flatten(ours)[k]}
    assert changed == {"adversarial.enabled": False}


def test_dry_run_prints_and_writes_nothing(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = tiny_run.words(tiny_data, tmp_path / "run", seed=7)
    assert tiny_run.main(*words, "--dry_run") == 0
    printed = capsys.readouterr().out
    shown, end = json.JSONDecoder().raw_decode(printed)
    assert shown["seed"] == 7
    rest = printed[end:]
    for network in ("embedder", "generator", "discriminator"):
        assert re.search(rf"parameters {network} +[\d,]+\n", rest)
        assert re.search(rf"operations {network} +[\d,]+ an image", rest)
    assert re.search(r"memory +\d+\.\d\d GiB at the peak of a step of F", rest)
    assert re.search(r"memory +\d+\.\d\d GiB at the peak of a step of G and D", rest)
    assert "steps     12 (F 4, F + perturbation 4, G and D 4)" in rest
    assert not list(tmp_path.iterdir())


def test_help_shows_every_field_with_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        tiny_run.main("--help")
    assert ended.value.code == 0
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", printed).split())
    for name, value in flatten(ExperimentConfig()).items():
        assert f"--{name} " in text, name
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        described = text.partition(f"--{name} ")[2].partition("(default: ")[2]
        assert described.startswith((f"{shown})", f"'{shown}')")), name


def test_fields_are_typed_and_reach_the_run(tiny_data):
    words = tiny_run.words(
        tiny_data, "nowhere",
        **{"evaluation.severities": (1, 5), "optim.learning_rate": "3e-4",
           "generator.latent_dim": None, "train.plain": None},
    )  # fmt: skip
    parsed = command.parse([*words, "--adversarial.enabled=False", "--train.steps", "3ep"])
    assert parsed.evaluation.severities == (1, 5)
    assert parsed.optim.learning_rate == 3e-4
    assert parsed.adversarial.enabled is False
    assert parsed.train.steps == "3ep"
    assert parsed.data.name == "folder"


def test_a_stored_configuration_is_read_back(tiny_finished):
    stored = json.loads((tiny_finished / "config.json").read_text())["config"]
    config = from_dict(stored)
    assert differences(config, config) == []
    assert dataclasses.asdict(config)["evaluation"]["severities"] == (3,)


# ---- the full-scale recipes ----------------------------------------------------------------------


def test_a_full_scale_recipe_runs_on_a_mock_of_its_data(tmp_path, monkeypatch):
    """afa_resnet50_cub, whose data cannot be downloaded everywhere, with few and small images."""
    png = tfds_mocks.png
    monkeypatch.setattr(tfds_mocks, "png", lambda tone: png(tone % 256))
    features, _ = tfds_mocks.MOCKS["caltech_birds2011"]
    classes = 12  # as many as the other tiny runs have, whose compiled functions then serve here
    features = features | {"label": tfds_mocks.CLASS(num_classes=classes)}
    data, home = tmp_path / "tfds", tmp_path / "run"
    tfds_mocks.write(
        "caltech_birds2011", features, dict.fromkeys(("train", "test"), range(classes)), data
    )
    changes = {"exp": "afa_resnet50_cub", "data.name": None, "train.steps": "3"}
    changes |= {"train.plain": "0", "train.generator_steps": "2", "train.evaluate_every": "5"}
    words = tiny_run.words(data, home, **changes)
    assert tiny_run.main(*words) == 0
    result = tiny_run.result(home)
    assert result["data"]["name"] == "tfds:caltech_birds2011"
    assert "the first 6 train" in result["data"]["protocol"]
    assert result["config"]["loss"]["name"] == "proxy_anchor"
    assert "catalogue" not in result["metrics"]["test"]["F"]
    assert set(result["metrics"]["test"]["fused"]["leave_one_out"]["clean"]) == CLEAN


def test_queries_without_positives_are_refused_before_training(tmp_path, capsys):
    data = tiny_run.images(tmp_path / "data")
    shutil.rmtree(data / "iconic")
    (data / "test").rename(data / "query")
    (data / "gallery").mkdir()
    for i in range(6, 12):  # of these three ask, the others are searched, and none trains
        name = f"class_{i:02d}"
        shutil.rmtree(data / "train" / name)
        if i > 8:
            (data / "query" / name).rename(data / "gallery" / name)
    for i in range(6):
        shutil.rmtree(data / "query" / f"class_{i:02d}")
    assert tiny_run.main(*tiny_run.words(data, tmp_path / "run")) == 2
    assert capsys.readouterr().err == (
        "error: data: none of the 12 queries has an image of its class in the gallery\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_huge_learning_rate_is_reported_as_divergence(tiny_data, tmp_path, capsys):
    words = tiny_run.words(tiny_data, tmp_path / "run", **{"optim.learning_rate": 1e38})
    assert tiny_run.main(*words) == EXIT_DIVERGED
    printed = capsys.readouterr().err
    assert printed.startswith("error: step ") and " is not finite; training stopped, " in printed
    assert printed.count("\n") == 1


def test_the_search_command_is_quoted_for_the_shell():
    for name in ("runs/mine", "runs/my own run", 'it\'s $HOME; `x` "y"', "-dash"):
        line = search_command(Path(name))
        assert shlex.split(line)[-2:] == [f"--run={name}", "YOUR_IMAGE.jpg"]
    assert search_command(Path("runs/mine")).endswith("search --run=runs/mine YOUR_IMAGE.jpg")
