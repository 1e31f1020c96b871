"""Fine-tuning: parts that stay still, statistics that stay, and parts that learn slower."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from afa import parallel
from afa.config import ExperimentConfig, with_changes
from afa.errors import UserError
from afa.models import backbones
from afa.models.backbones.contract import Options
from afa.models.freezing import Frozen
from afa.models.layers import apply
from afa.models.networks import build_backbone, frozen_parts
from afa.train import optim, steps


def names_of(name: str, options: Options = Options(classes=10)) -> tuple[Any, list[str]]:  # noqa: B008
    module = backbones.build(name, options)
    side = backbones.member(name).input_size

    def run(module, x):
        return module.logits(module.upper(module.lower(x, False, "clean"), False, "clean"))

    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), method=run)
    )
    return module, list(shapes["params"])


@pytest.mark.parametrize("name", sorted(set(backbones.MEMBERS) - {"tiny"}))
def test_stages_cover_everything_but_the_published_classifier(name):
    """Each stage has parts, one more frozen stage holds more, and all of them hold all."""
    module, parts = names_of(name)
    held = [
        [part for part in parts if Frozen(count).holds(module, part)]
        for count in range(len(module.STAGES) + 1)
    ]
    classifier = {"fc", "_fc", "classifier", "last_linear", "head", "classifier.1"}
    classifier |= {f"classifier.{i}" for i in (0, 3, 6)}
    assert set(held[0]) <= classifier and held[0]
    assert all(len(a) < len(b) for a, b in itertools.pairwise(held))
    assert set(held[-1]) == set(parts)


def moved(config: ExperimentConfig) -> tuple[Any, Any]:
    """F's variables of a tiny state before and after one step."""
    context = tiny.context(config)
    own = context.networks.embedder.clone(frozen=frozen_parts(config))
    context = dataclasses.replace(
        context, networks=dataclasses.replace(context.networks, embedder=own)
    )
    before = parallel.to_host(tiny.state(context))
    step = parallel.data_parallel(
        functools.partial(steps.embedder_step, context=context, perturb=True)
    )
    after, _ = step(before, tiny.batch())
    return before.variables["embedder"], parallel.to_host(after.variables["embedder"])


def changed(before, after) -> dict[str, bool]:
    """Part of the backbone, or of F, -> whether it moved."""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(before):
        key = path[1].key if path[0].key == "backbone" else path[0].key
        other = after
        for each in path:
            other = other[each.key]
        flat[key] = flat.get(key, False) or not np.array_equal(leaf, other)
    return flat


def test_frozen_stages_keep_parameters_and_statistics():
    before, after = moved(tiny.config(**{"backbone.frozen_stages": 2}))
    params = changed(before["params"], after["params"])
    stats = changed(before["batch_stats"], after["batch_stats"])
    still = {"conv1", "bn1", "layer1.0"}
    assert {name for name, did in params.items() if not did} == still
    assert {name for name, did in stats.items() if not did} == still - {"conv1"}


def test_frozen_norm_keeps_only_the_statistics():
    before, after = moved(tiny.config(**{"backbone.frozen_norm": True}))
    assert all(changed(before["params"], after["params"]).values())
    assert not any(changed(before["batch_stats"], after["batch_stats"]).values())


def test_training_normalises_with_frozen_statistics():
    """In training as in evaluation, whatever the batch."""
    context = tiny.context(tiny.config())
    state = tiny.state(context)
    images = jnp.asarray(tiny.batch()["image"], jnp.float32) / 255
    still = context.networks.embedder.clone(frozen=Frozen(norm=True))
    variables: Any = state.variables["embedder"]
    trained, _ = apply(still, variables, images, train=True, mutable=["batch_stats"])
    evaluated = apply(still, variables, images, train=False)
    for mine, expected in zip(trained, evaluated, strict=True):
        np.testing.assert_array_equal(mine, expected)


def updates(config: ExperimentConfig, count: int) -> list[dict[str, float]]:
    """Sizes of the updates that F's parts get of a constant gradient."""
    base = {"optim.name": "sgd", "optim.warmup": "0", "optim.clip": 0.0, "optim.weight_decay": 0.0,
            "optim.schedule": "constant", "optim.learning_rate": 1.0}  # fmt: skip
    config = with_changes(config, **base)
    optimiser: Any = optim.optimisers(config, 10, 1, 5)["embedder"]
    params = {"backbone": {"layer1.0": {"kernel": jnp.ones(2)}, "fc": {"kernel": jnp.ones(2)}},
              "global_head": {"kernel": jnp.ones(2)}}  # fmt: skip
    state, found = optimiser.init(params), []
    for _ in range(count):
        moves, state = optimiser.update(jax.tree.map(jnp.ones_like, params), state, params)
        found.append(
            {
                "backbone": float(optax.tree.norm(moves["backbone"]["layer1.0"])),
                "classifier": float(optax.tree.norm(moves["backbone"]["fc"])),
                "head": float(optax.tree.norm(moves["global_head"])),
            }
        )
    return found


def test_learning_rates_of_backbone_and_published_classifier():
    for found in updates(tiny.config(**{"optim.backbone_rate": 0.1}), 3):
        assert found["backbone"] == pytest.approx(0.1 * found["head"], rel=1e-6)
        assert found["classifier"] == 0


def test_only_new_layers_are_trained_at_first():
    found = updates(tiny.config(**{"optim.head_warmup": "20%"}), 4)
    assert [each["backbone"] > 0 for each in found] == [False, False, True, True]
    assert all(each["head"] > 0 for each in found)


def test_frozen_parameters_do_not_decay():
    config = tiny.config(**{"backbone.frozen_stages": 5, "optim.weight_decay": 0.5})
    optimiser: Any = optim.optimisers(config, 10, 1, 5)["embedder"]
    params = {"backbone": {"layer4.0": {"conv1": {"kernel": jnp.ones(2)}}}}
    moves, _ = optimiser.update(params, optimiser.init(params), params)
    assert not moves["backbone"]["layer4.0"]["conv1"]["kernel"].any()


def test_too_many_frozen_stages_are_an_error():
    with pytest.raises(UserError, match=r"backbone\.frozen_stages=6: resnet50 has 5 stages"):
        build_backbone(tiny.config(**{"backbone.frozen_stages": 6}))


def test_rematerialisation_does_not_change_the_result():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 3)), jnp.float32)

    def run(module, x):
        return module.upper(module.lower(x, False, "clean"), False, "clean").sum()

    for name in ("squeezenet1_1", "bn_inception"):
        plain, remat = (backbones.build(name, Options(remat=each)) for each in (False, True))
        shapes = [
            jax.eval_shape(lambda m=m: m.init(jax.random.key(0), x, method=run))
            for m in (plain, remat)
        ]
        assert shapes[0] == shapes[1]
        kept = [
            str(jax.make_jaxpr(jax.grad(lambda v, m=m: m.apply(v, x, method=run)))(shapes[0]))
            for m in (plain, remat)
        ]
        assert "remat" not in kept[0] and "remat" in kept[1]
        if name == "squeezenet1_1":
            variables = plain.init(jax.random.key(0), x, method=run)
            outputs = [m.apply(variables, x, method=run) for m in (plain, remat)]
            np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-6)
