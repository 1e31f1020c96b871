"""One device, eight devices, and two processes of two devices, on the same global batch.

All comparisons are in float32. The losses of the first step agree to 1e-5. Later losses depend on
the rounding of earlier parameters and agree to 1e-4, as do the final parameters.
"""

import os
import pickle
import platform
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import loss_cases
import numpy as np
import pytest
from arrays import near_tree
from paths import ROOT, SUPPORT

from afa import parallel
from afa.errors import UserError
from afa.train.health import CHECKED

FIRST, LATER = 1e-5, 1e-4
# Gradients involve more sums than losses, and R1 two differentiations.
GRADIENTS = 1e-4
LOSSES = [name for name in CHECKED if "gradient" not in name and name != "r1"]
TERMS = ("d_pixels", "g_adversarial")  # those that know the damage of all devices
WORKER = SUPPORT / "parallel_worker.py"


def launch(task, folder, devices, *rest):
    # A step runs only three times, and optimised code takes twice as long to compile.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    paths = os.pathsep.join([str(SUPPORT), str(ROOT)])
    environment = os.environ | {
        "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths,
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"] or "",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, WORKER, task, folder, *map(str, rest)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*running):
    try:
        for each in running:
            output, _ = each.communicate(timeout=1500)
            assert each.returncode == 0, output
    finally:
        for each in running:
            each.kill()


def read(folder, name):
    return pickle.loads((folder / f"{name}.pickle").read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def eight(folder):
    finish(launch("eight", folder, 8))
    return read(folder, "eight")


@pytest.fixture(scope="module")
def four(eight, folder):
    finish(launch("four", folder, 4))
    return read(folder, "four")


@pytest.fixture(scope="module")
def pair(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    finish(*(launch("pair", folder, 2, index, port) for index in range(2)))
    return read(folder, "pair-0"), read(folder, "pair-1")


def agree(found, expected):
    """Asserts that the metrics of every step and the final parameters agree."""
    for number, (actual, other) in enumerate(
        zip(found["metrics"], expected["metrics"], strict=True)
    ):
        assert set(actual) == set(other)
        compared = [name for name in (*CHECKED, *TERMS) if name in actual]
        assert compared
        for name in compared:
            first = FIRST if name in (*LOSSES, *TERMS) else GRADIENTS
            np.testing.assert_allclose(
                actual[name], other[name], first if number == 0 else LATER, err_msg=name
            )
    pairs = zip(
        jax.tree.leaves(found["variables"]), jax.tree.leaves(expected["variables"]), strict=True
    )
    for actual, other in pairs:
        scale = max(float(np.abs(other).max()), 1.0)
        np.testing.assert_allclose(actual, other, rtol=0, atol=LATER * scale)


def same_bits(found, expected):
    leaves, others = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(leaves) == len(others)
    for actual, other in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(actual, other)


@pytest.mark.parametrize("kind", ["memory", "adversarial", "triplet"])
def test_eight_devices_agree_with_one(eight, kind):
    assert eight["devices"] == 8
    assert (kind == "adversarial") == (set(TERMS) <= set(eight[kind, "one"]["metrics"][0]))
    agree(eight[kind, "pmap"], eight[kind, "one"])


@pytest.mark.parametrize("name", loss_cases.CASES)
def test_every_loss_agrees_on_eight_devices_and_one(eight, name):
    """Values, gradients of rows, proxies and parameters, and memories, over three steps."""
    (metrics, state), (expected_metrics, expected) = (
        eight["losses", devices] for devices in ("eight", "one")
    )
    for number, (found, other) in enumerate(zip(metrics, expected_metrics, strict=True)):
        tolerance = 1e-4 if number == 0 else 1e-3
        np.testing.assert_allclose(found[name]["value"], other[name]["value"], tolerance, 1e-6)
        near_tree(found[name]["gradient"], other[name]["gradient"], tolerance)
    found, other = ((each["memory"][name], each["free"][name]) for each in (state, expected))
    near_tree(found, other, LATER)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics))


@pytest.mark.parametrize("kind", ["memory", "adversarial"])
def test_pmap_and_shard_map_give_the_same_bits(eight, kind):
    same_bits(eight[kind, "pmap"], eight[kind, "shard_map"])


@pytest.mark.parametrize("kind", ["adversarial", "triplet"])
def test_two_processes_agree_with_one_device(eight, pair, kind):
    for index, each in enumerate(pair):
        assert each["devices"] == (4, 2)
        assert each["processes"] == (2, index)
        agree(each[kind], eight[kind, "one"])
    same_bits(pair[0][kind], pair[1][kind])


def test_a_checkpoint_of_eight_devices_resumes_on_four(eight, four):
    assert four["devices"] == 4
    state, digest = four["restored"]
    same_bits(state, eight["saved"][0])
    assert digest == eight["saved"][1]
    assert (four["position"].batch, four["position"].train_seconds) == (2, 1.5)
    for name in LOSSES:
        if name in eight["next"]:
            np.testing.assert_allclose(four["next"][name], eight["next"][name], FIRST)
    # Saving does not change the run.
    same_bits(eight["next"], eight["memory", "pmap"]["metrics"][2])


@pytest.mark.parametrize("impl", ["pmap", "shard_map"])
def test_a_batch_that_cannot_be_divided_is_refused(eight, impl):
    assert eight["refused", impl] == "a batch of 12 rows cannot be divided among 8 devices"


def test_map_rows_pads_and_removes_the_padding(eight, pair):
    for found in (eight, *pair):
        x, n = found["rows"]["x"], found["rows"]["n"]
        for count, out in found["mapped"].items():
            np.testing.assert_array_equal(out["y"], 2 * x[:count])
            np.testing.assert_array_equal(out["n"], n[:count] + 1)
        np.testing.assert_array_equal(found["shared"]["y"], 3 * x)
    # 11 rows on 8 devices: 2 each, with copies of the last row; 8 rows or 1 row: 1 each.
    assert set(eight["seen"]) == {(2, 2), (1, 2)}


# ---- on the devices of the test process --------------------------------------------------------


def test_outside_of_a_mapped_step_there_is_one_device():
    x = jnp.arange(3.0)
    assert parallel.axis_size() == 1
    assert parallel.axis_index() == 0
    assert parallel.pmean({"x": x})["x"] is x
    assert parallel.all_gather(x) is x


def test_the_gradient_of_a_loss_of_gathered_rows_is_that_of_the_global_batch():
    """As in the steps: every device differentiates the same global loss, then `pmean`."""

    def loss(w, x):
        rows = parallel.all_gather(x * w)
        return jnp.sum(jnp.square(rows @ rows.T))

    def step(w, batch):
        return w, parallel.pmean(jax.grad(loss)(w, batch["x"]))

    x = np.arange(12, dtype=np.float32).reshape(4, 3) * parallel.device_count() / 12
    w = jnp.asarray([1.0, -2.0, 0.5])
    expected = jax.grad(lambda w: jnp.sum(jnp.square((x * w) @ (x * w).T)))(w)
    for impl in ("pmap", "shard_map"):
        _, found = parallel.data_parallel(step, impl)(jnp.copy(w), {"x": x})
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("impl", ["pmap", "shard_map"])
def test_the_state_is_donated(impl):
    step = parallel.data_parallel(lambda state, batch: (state + 1, batch.sum()), impl)
    state = parallel.replicate(jnp.zeros(5))
    after, _ = step(state, np.ones((4, 2), np.float32))
    assert state.is_deleted()
    np.testing.assert_array_equal(after, np.ones(5))


def test_replicating_twice_makes_no_copy():
    once = parallel.replicate({"x": np.ones(3)})
    assert parallel.replicate(once)["x"] is once["x"]
    np.testing.assert_array_equal(parallel.to_host(once)["x"], np.ones(3))
    np.testing.assert_array_equal(parallel.to_host(parallel.to_host(once))["x"], np.ones(3))


def test_compiled_once_works_inside_a_trace():
    double = parallel.compiled_once(lambda x: 2 * x)
    assert double(jnp.asarray(3.0)) == 6
    assert jax.jit(double)(jnp.asarray(3.0)) == 6
    assert jax.eval_shape(double, jnp.zeros((2, 3))).shape == (2, 3)


def test_small_computations_of_an_accelerator_are_on_the_cpu(monkeypatch):
    inside = []
    look = parallel.on_cpu()(lambda: inside.append(jax.config.jax_default_device))  # pyright: ignore
    look()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    look()
    assert inside == [None, jax.devices("cpu")[0]]


def test_operations_are_counted_without_computing():
    """A product of (3, 5) and (5, 7), on arrays and on shapes."""
    a, b = jnp.ones((3, 5)), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    assert parallel.flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7


def test_operations_are_counted_where_only_compiled_programs_are_analysed(monkeypatch):
    """As on GPUs and TPUs without the CPU."""
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    a = jnp.ones((3, 5))
    assert parallel.flops(jnp.matmul, a, jnp.ones((5, 7))) == pytest.approx(2 * 3 * 5 * 7, rel=0.1)


def test_local_blocks_cover_all_rows():
    assert list(parallel.local_blocks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(parallel.local_blocks(0, 3)) == []


def test_rows_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert parallel.split_rows(np.zeros((8, 2))).shape == (4, 2, 2)
    with pytest.raises(UserError, match="a batch of 6 rows cannot be divided among 4 devices"):
        parallel.split_rows(np.zeros((6, 2)))


# ---- memory on the CPU -------------------------------------------------------------------------

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from afa import runtime

if sys.argv[1] == "keep":
    runtime.keep_memory()
step = jax.jit(lambda x: jnp.sort(jnp.sin(x) @ x, axis=0).sum())
x = jnp.ones((2048, 2048))
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.skipif(parallel.accelerated(), reason="an accelerator has its own memory")
def test_steps_reuse_the_memory_of_the_previous_step():
    """Counts page faults: 16 MiB of working memory are 4,096 pages. The minimum over the steps is
    used, because the heap is still fragmented in the first ones."""

    def faults(word):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", FAULTS, word]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("leave") > 4000
    assert faults("keep") < 400
