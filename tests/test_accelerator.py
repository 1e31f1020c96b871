"""An accelerator computes what the CPU computes: `python -m pytest -m accelerator`.

Selected by name only. On a machine without an accelerator the tests run too, with both sides on the
CPU.
"""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import tiny
import tiny_run
from arrays import near_tree
from paths import ROOT

from afa import parallel
from afa.config import with_changes
from afa.errors import EXIT_PREEMPTED
from afa.models.networks import build_networks
from afa.retrieval import exact
from afa.serving import package
from afa.serving.predictor import Predictor
from afa.train import optim, state, steps
from experiments.configs import afa_resnet50

pytestmark = pytest.mark.accelerator

FLOAT32 = 1e-4  # of the largest entry, with the precision "highest"; ten times that for gradients
TF32 = 5e-3  # distance of unit vectors, in float32 with the precision of the device
BFLOAT16 = 0.99  # cosine
# Kernels that add in a fixed order, and no choice among kernels by their speed.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
STEPS = {
    "plain": functools.partial(steps.embedder_step, perturb=False),
    "perturbed": functools.partial(steps.embedder_step, perturb=True),
    "G and D": steps.generator_step,
}


def on_cpu(function, *arguments):
    """Compiles and calls a function for the CPU, with the networks as they are there."""
    cpu = jax.devices("cpu")[0]

    def fresh(*arguments):  # JAX keeps the trace of a function, and the device has another one
        return function(*arguments)

    with jax.default_device(cpu), parallel.lowered_for(accelerator=False):
        return jax.tree.map(np.asarray, jax.jit(fresh)(*jax.device_put(arguments, cpu)))


def cosine(one, other):
    """The cosine of two trees as vectors."""
    one, other = (
        np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])
        for tree in (one, other)
    )
    return one @ other / np.sqrt((one @ one) * (other @ other))


def recording() -> dict[str, optax.GradientTransformation]:
    """Optimisers that keep the last gradient as their state and do not change a parameter."""
    return {name: tiny.recorder() for name in ("embedder", "generator", "discriminator")}


@pytest.fixture(scope="module")
def device_run(tiny_data, tmp_path_factory):
    """A complete run on the device in float32, by deterministic kernels."""
    home = tmp_path_factory.mktemp("device") / "run"
    code, _, err = tiny_run.finish(started(tiny_data, home))
    assert code == 0, err
    return home


def started(data, home, **environment):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    words = tiny_run.words(data, home, **{"train.precision": "float32"})
    return tiny_run.start(*words, XLA_FLAGS=flags, **environment)


def test_a_stopped_run_continues_to_the_same_bits(device_run, tiny_data, tmp_path):
    """Stopped by SIGTERM between two checkpoints, in the stage of perturbed features."""
    home = tmp_path / "run"
    code, _, err = tiny_run.finish(started(tiny_data, home, END="step:5:SIGTERM"))
    assert code == EXIT_PREEMPTED, err
    code, _, err = tiny_run.finish(started(tiny_data, home))
    assert code == 0, err
    assert tiny_run.digest(home) == tiny_run.digest(device_run)
    assert tiny_run.figures(home) == tiny_run.figures(device_run)


def test_a_package_gives_the_vectors_of_the_run(device_run, tmp_path):
    """On the device, and on the CPU of the same machine."""
    out = tmp_path / "package"
    package.pack(device_run, out)
    assert Predictor.load(out).check() < TF32
    done = subprocess.run(
        [sys.executable, "-m", "afa.serving.predictor", f"--package={out}", "--check"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.split()[2]) < TF32


@pytest.mark.parametrize("name", STEPS)
def test_training_steps_agree_with_the_cpu(name):
    """Metrics and gradients, in float32."""
    context = tiny.context(tiny.config(), recording())
    begin = jax.tree.map(np.asarray, tiny.state(context))
    step = functools.partial(STEPS[name], context=context)
    expected, expected_metrics = on_cpu(step, begin, tiny.batch())
    with jax.default_matmul_precision("highest"):
        found, metrics = jax.jit(step)(begin, tiny.batch())
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=FLOAT32, atol=FLOAT32, err_msg=key)
    near_tree(found.opt_state, expected.opt_state, 10 * FLOAT32)


@pytest.mark.parametrize("impl", ["pmap", "shard_map"])
def test_a_step_over_all_devices_equals_one_over_the_whole_batch(impl):
    context = tiny.context(tiny.config(), recording())
    begin = jax.tree.map(np.asarray, tiny.state(context))
    step = functools.partial(STEPS["perturbed"], context=context)
    with jax.default_matmul_precision("highest"):
        whole, metrics = jax.jit(step)(begin, tiny.batch())
        found, others = parallel.data_parallel(step, impl)(begin, tiny.batch())
    near_tree(found.opt_state, whole.opt_state, 10 * FLOAT32)
    near_tree(others["metric_loss"], metrics["metric_loss"], FLOAT32)


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11_bn", "densenet121", "vit_s16"])
def test_descriptors_agree_with_the_cpu(backbone):
    """At 96 px: in float32, and in bfloat16 on the device."""
    size = 96
    changes = {"backbone.name": backbone, "backbone.weights": "random", "data.image_size": size}
    images = np.random.default_rng(0).uniform(size=(4, size, size, 3)).astype(np.float32)

    def networks(precision):
        chosen = with_changes(
            afa_resnet50.config(True), **changes, **{"train.precision": precision}
        )
        return build_networks(chosen, 10)

    variables = jax.tree.map(np.asarray, networks("float32").init(jax.random.key(0), size))

    def describe(precision):
        made = networks(precision)
        return lambda v, x: made.blocks(v, x, ("global", "local", "flip"))

    expected = on_cpu(describe("float32"), variables, images)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(describe("float32"))(variables, images)
    near_tree(found, expected, FLOAT32)
    rounded = jax.jit(describe("bfloat16"))(variables, images)
    for name, value in expected.items():
        assert cosine(rounded[name], value) > BFLOAT16, name


def test_bfloat16_gradients_point_the_same_way():
    """A step of F with a ResNet-18 at 64 px in bfloat16, compared with float32 on the CPU."""
    size, rows, classes = 64, 16, 8

    def context(precision):
        chosen = with_changes(
            afa_resnet50.config(True),
            **{"backbone.name": "resnet18", "train.precision": precision, "optim.clip": 0.0},
        )
        networks = build_networks(chosen, classes)
        return steps.StepContext(networks, recording(), chosen)

    def step(precision):
        return functools.partial(STEPS["plain"], context=context(precision))

    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (rows, size, size, 3), np.uint8)
    batch = {"image": images, "clean": images, "corruption": np.zeros(rows, np.int32),
             "label": (np.arange(rows) % classes).astype(np.int32)}  # fmt: skip
    reference = context("float32")
    begin = state.create(
        reference.networks, reference.optimisers, 0, size, reference.config.loss, rows
    )
    begin = jax.tree.map(np.asarray, begin)
    expected, expected_metrics = on_cpu(step("float32"), begin, batch)
    found, metrics = jax.jit(step("bfloat16"))(begin, batch)
    assert float(metrics["metric_loss"]) == pytest.approx(
        float(expected_metrics["metric_loss"]), rel=0.03
    )
    assert cosine(found.opt_state, expected.opt_state) > 0.9


def test_exact_search_equals_numpy():
    """Ids and similarities of 500 queries in 40,000 rows, two tiles and more."""
    draw = np.random.default_rng(0)
    gallery, queries = (
        exact.normalise(draw.standard_normal((rows, 64)).astype(np.float32))
        for rows in (40_000, 500)
    )
    scores, rows = exact.topk(queries, gallery, 20)
    product = queries.astype(np.float64) @ gallery.T.astype(np.float64)
    expected = np.sort(product, axis=1)[:, ::-1][:, :20]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(product, rows, axis=1), expected, atol=1e-6)
    _, approximate = exact.topk(queries, gallery, 20, recall=0.95)
    shared = [len(np.intersect1d(*pair)) for pair in zip(rows, approximate, strict=True)]
    assert np.mean(shared) / 20 > 0.93


def test_ranks_of_positives_equal_numpy():
    """Up to neighbours whose similarities differ by less than float32 can tell."""
    draw = np.random.default_rng(1)
    gallery = exact.normalise(draw.standard_normal((3000, 32)).astype(np.float32))
    labels = draw.integers(0, 100, 3000)
    own = np.arange(200)
    ranks = exact.positive_ranks(gallery[own], gallery, labels[own], labels, own)
    product = gallery[own].astype(np.float64) @ gallery.T.astype(np.float64)
    product[own, own] = -np.inf
    order = np.argsort(-product, axis=1, kind="stable")
    positive = (labels[order] == labels[own, None]) & (order != own[:, None])
    expected = np.nonzero(positive)[1]
    found = ranks[ranks >= 0]
    assert len(found) == len(expected)
    assert np.abs(found - expected).max() <= 1
    assert np.mean(found == expected) > 0.999


def test_a_step_of_g_and_d_takes_no_more_memory_than_one_of_f(record_property):
    """At full scale: the temporary memory of the compiled steps."""
    full = with_changes(afa_resnet50.config(False), **{"backbone.weights": "random"})
    networks = build_networks(full, 100)
    optimisers = optim.optimisers(full, 100, 100, 10)
    context = steps.StepContext(networks, optimisers, full)
    size = full.data.image_size
    rows = full.data.batch_size
    begin = jax.eval_shape(lambda: state.create(networks, optimisers, 0, size, full.loss, rows))
    found = {}
    for name, rows in {
        "perturbed": full.data.batch_size,
        "G and D": full.generator.batch_size,
    }.items():
        images = jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8)
        indices = jax.ShapeDtypeStruct((rows,), np.int32)
        damage = jax.ShapeDtypeStruct((rows, size, size), np.bool_)
        batch = {"clean": images, "image": images, "label": indices, "corruption": indices,
                 "damage": damage}  # fmt: skip
        step = jax.jit(functools.partial(STEPS[name], context=context), donate_argnums=0)
        analysis = step.lower(begin, batch).compile().memory_analysis()
        assert analysis is not None
        found[name] = analysis.temp_size_in_bytes
        record_property(f"step memory in bytes, {name}, batch {rows}", found[name])
    assert found["G and D"] <= found["perturbed"]
