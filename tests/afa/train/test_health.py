"""Metrics of log lines, and checks for non-finite values."""

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import near, unit

from afa.train import health


def test_batch_recall_uses_the_nearest_other_row():
    rows = jnp.asarray([[1, 0], [0.9, 0.1], [0, 1], [-1, 0.1]], jnp.float32)
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    # Nearest others: 1, 0, 1, 2.
    assert health.batch_recall(rows, jnp.array([0, 0, 1, 1])) == 0.75
    assert health.batch_recall(rows, jnp.array([0, 1, 2, 3])) == 0


def test_mean_cosine_of_all_pairs_and_of_a_collapsed_embedding():
    rows, labels = unit(0, 7, 4), jnp.arange(7)
    similarity = np.asarray(rows @ rows.T)
    expected = (similarity.sum() - 7) / 42
    near(health.embedding(rows, labels)["mean_cosine"], expected)
    near(health.embedding(jnp.tile(rows[:1], (7, 1)), labels)["mean_cosine"], 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_loss_that_is_not_finite_is_named(bad):
    fine = dict.fromkeys(health.CHECKED, 1.0) | {"psnr_in": [bad]}
    assert health.first_not_finite(fine) is None
    # In order of computation, independent of the order of names.
    broken = fine | {"generator_loss": bad, "metric_loss": bad, "d_real": bad}
    assert health.first_not_finite(dict(sorted(broken.items()))) == "metric_loss"
    assert health.first_not_finite({"generator_gradient_norm": bad}) == "generator_gradient_norm"


class Parts(flax.struct.PyTreeNode):
    variables: dict
    average: dict
    loss_memory: dict


def test_the_first_part_of_the_state_that_is_not_finite_is_named():
    def state(weight=1.0, mean=1.0):
        network = {"params": {"w": jnp.asarray([0.0, weight])}, "batch_stats": {}}
        average = {"embedder": {"batch_stats": jnp.asarray(mean)}}
        return Parts({"embedder": network}, average, {"global": {}})

    assert health.first_part_not_finite(state()) is None
    named = health.first_part_not_finite(state(weight=np.inf))
    assert named == "variables/embedder/params/w"
    assert health.first_part_not_finite(state(mean=np.nan)) == "average/embedder/batch_stats"


def test_a_log_line_is_the_mean_of_its_steps():
    steps = [
        {"metric_loss": 1.0, "r1": 0.0},
        {"metric_loss": 3.0, "r1": 4.0},
    ]
    assert health.summarise(steps, ()) == {"metric_loss": 2.0, "r1": 2.0}


def test_psnr_of_a_log_line_is_weighted_by_images():
    steps = [
        {"psnr_in": [30.0, 20.0, 0.0], "psnr_out": [33.0, 22.0, 0.0], "psnr_count": [1, 1, 0]},
        {"psnr_in": [0.0, 90.0, 0.0], "psnr_out": [0.0, 96.0, 0.0], "psnr_count": [0, 3, 0]},
    ]
    assert health.summarise(steps, ("noise", "blur")) == {
        "psnr_in/clean": 30.0, "psnr_in/noise": 27.5,
        "psnr_out/clean": 33.0, "psnr_out/noise": 29.5,
    }  # fmt: skip


def test_a_warning_when_images_become_worse():
    line = {"psnr_in/noise": 20.0, "psnr_out/noise": 22.5, "psnr_in/blur": 25.0,
            "psnr_out/blur": 24.61, "psnr_in/clean": 60.0, "psnr_out/clean": 36.0}  # fmt: skip
    names = ("noise", "blur", "occlusion")
    warning = health.worsened(line, names, ends=True)
    assert warning == "G makes its input worse: blur 25.00 -> 24.61 dB"
    assert health.worsened(line | {"psnr_out/blur": 25.0}, names, ends=True) is None
    assert health.worsened({"loss": 1.0}, names, ends=True) is None


def test_during_a_stage_only_the_mean_of_all_corruptions_counts():
    line = {"psnr_in/noise": 20.0, "psnr_out/noise": 20.25, "psnr_in/blur": 25.0,
            "psnr_out/blur": 24.9}  # fmt: skip
    names = ("noise", "blur", "occlusion")
    assert health.worsened(line, names, ends=False) is None
    warning = health.worsened(line | {"psnr_out/blur": 24.5}, names, ends=False)
    assert warning == "G makes its input worse: mean -0.12 dB"
    assert health.worsened({"loss": 1.0}, names, ends=False) is None
