"""A complete run with the inpainting generator, and the package of its routed queries."""

import json

import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file

from afa.models.fusion import Fusion, Route
from afa.serving import package
from afa.serving.predictor import Predictor


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    home = tmp_path_factory.mktemp("inpainting") / "run"
    chosen = {"generator.name": "inpainting", "generator.family": "overlays",
              "generator.family_probability": 1.0}  # fmt: skip
    assert tiny_run.main(*tiny_run.words(tiny_data, home, **chosen)) == 0
    return home


def test_its_log_and_its_table(run):
    logged = [line for line in tiny_run.lines(run) if line.get("stage") == "G and D"]
    losses = [line["d_pixels"] for line in logged if "loss" in line]
    # At most that of an estimate that knows nothing, which is where D begins.
    assert losses and all(0 < loss < np.log(2) + 0.05 for loss in losses)
    rows = tiny_run.result(run)["metrics"]["test"]
    names = list(rows)
    at = names.index("query by discriminator")
    assert names[at : at + 3] == [
        "query by discriminator", "query by damage", "query by confidence"
    ]  # fmt: skip
    assert all(0 <= row["leave_one_out"]["clean"]["map_at_r"] <= 1 for row in rows.values())
    assert rows["query G"]["cost"] > rows["query by hand_made"]["cost"] - 1e-6


def test_a_package_asks_the_discriminator_for_the_damage(run, tmp_path, unoptimised):
    """Its vectors are those of search, for queries restored by their damage."""
    path = run / "embeddings" / "index.json"
    fusions = {
        "always": Route("", (("restored", 0.0),)),
        "by damage": Route("damage", (("original", 0.0), ("restored", -0.5))),
    }
    for name, route in fusions.items():
        fusion = Fusion.of({"global": 1.0, "restored": 0.5}, route)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fusion": fusion.to_json()}))
        package.pack(run, tmp_path / name, "float32")
        assert Predictor.load(tmp_path / name).check() < 1e-4
        weights = load_file(tmp_path / name / "weights.safetensors")
        networks = {each.partition("/")[0] for each in weights}
        assert networks == {"embedder", "generator", "discriminator"}
        # The layers of the map, and not that of the logit of the whole.
        needed = {each for each in weights if each.startswith("discriminator/")}
        assert any("Block" in each for each in needed)
        assert not any("Dense" in each for each in needed)
