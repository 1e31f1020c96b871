"""The baseline beside pytorch-metric-learning: which runs it takes, and, with PyTorch, its peer."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afa.config import ExperimentConfig, with_changes
from afa.errors import UserError
from experiments.benchmarks import metric_learning
from experiments.configs import afa_resnet18

BASELINE = {"adversarial.enabled": False, "backbone.stem": "imagenet"}


def baseline(**changes) -> ExperimentConfig:
    return with_changes(afa_resnet18.config(True), **BASELINE | changes)


def test_runs_that_the_peer_can_follow(tmp_path):
    metric_learning._check(tmp_path, baseline())
    for changes, message in (
        ({"adversarial.enabled": True}, "adversarial.enabled=True, and the peer only False"),
        ({"loss.name": "cosface"}, "loss.name='cosface', and the peer only 'norm_softmax'"),
        ({"optim.backbone_rate": 0.1}, "optim.backbone_rate=0.1, and the peer only 1"),
        ({"train.consistency": 0.5}, "train.consistency=0.5, and the peer only 0"),
        ({"backbone.name": "squeezenet1_0"}, "the peer is a ResNet"),
    ):
        with pytest.raises(UserError) as caught:
            metric_learning._check(tmp_path, baseline(**changes))
        assert message in str(caught.value)


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    known = importlib.util.find_spec

    def without(name):
        return lambda each: None if each == name else known("json")

    for name in ("torch", "pytorch_metric_learning"):
        monkeypatch.setattr(metric_learning.importlib.util, "find_spec", without(name))
        assert metric_learning.main(["--runs", str(tmp_path)]) == 2
        assert f"{name} is not installed; install the extra `bench`" in capsys.readouterr().err
    monkeypatch.setattr(metric_learning.importlib.util, "find_spec", without(""))
    assert metric_learning.main(["--runs", str(tmp_path)]) == 2
    assert "is not a finished run" in capsys.readouterr().err


@pytest.mark.skipif(
    not all(importlib.util.find_spec(each) for each in ("torch", "pytorch_metric_learning")),
    reason="needs the extra `bench`",
)
def test_the_peer_starts_as_our_network(tmp_path):
    """Same descriptors before training; with the average of the first step it has changed."""
    import torch

    from afa.models import layers
    from afa.models.networks import build_networks
    from experiments.benchmarks.torch_twin import OneDescriptor, Trainer, Twin, load_flax_params
    from experiments.benchmarks.training import dotted

    config = baseline(**{"data.image_size": 32})
    networks = build_networks(config, classes=3)
    variables = networks.init(jax.random.key(0), 32)
    twin = load_flax_params(Twin(config, 3), dotted(variables["embedder"]["params"]))
    model = OneDescriptor(twin, torch.nn.Identity())
    trainer = Trainer(config, model, "channels_last")
    trainer.use_average()
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    with torch.inference_mode():
        found = model.describe(trainer.prepared(torch.from_numpy(images)))
    ours = layers.apply(
        networks.embedder, variables["embedder"], jnp.asarray(images / np.float32(255)), train=False
    ).global_descriptor
    np.testing.assert_allclose(found.numpy(), ours, atol=1e-4)
