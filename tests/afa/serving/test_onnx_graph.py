"""ONNX models of the networks: onnxruntime and JAX give equal outputs."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax

from afa import parallel
from afa.config import ExperimentConfig, with_changes
from afa.errors import UserError
from afa.models import backbones
from afa.models.fusion import Fusion, Route
from afa.models.generators.inpainting import InpaintingGenerator
from afa.models.networks import build_networks
from afa.models.routing import JUDGES
from afa.models.unet import clip_unit
from afa.serving import onnx_graph, package
from experiments import package as command

SIDE = 8


@pytest.fixture
def runtime():
    """onnxruntime; skips the test unless it and onnx are installed."""
    pytest.importorskip("onnx")
    return pytest.importorskip("onnxruntime")


@pytest.fixture
def compare(runtime):
    """Compares a function of uint8 images in JAX and ONNX, for several batch sizes."""

    def check(function, size=SIDE, tolerance=1e-5, views=None):
        content = onnx_graph.model(function, size, {"checkpoint": "step-1"})
        session = runtime.InferenceSession(content)
        assert session.get_modelmeta().custom_metadata_map == {"checkpoint": "step-1"}
        if views is None:
            views = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), np.uint8)
        expected = np.asarray(jax.jit(function)(views))
        for count in (len(views), 1, 3):
            (found,) = session.run(None, {"views": views[:count]})
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected[:count], rtol=0, atol=tolerance)
        return session

    return check


def search_function(networks, variables, size, route=None):
    """The function that search uses, with all blocks at different weights."""
    names = networks.block_names()
    fusion = Fusion.of({name: 1 + 0.25 * i for i, name in enumerate(names)}, route)
    network, weights = package.network(networks, variables, fusion), package.named(variables)
    return lambda views: network(weights, views)


SECOND = ("flip", "median", "standardise", "clahe", "zoom")
EVERY_VIEW = (("original", 0.0), ("median", 0.1), ("standardise", -0.1), ("clahe", 0.0),
              ("zoom", 0.1), ("restored", 0.05))  # fmt: skip


@pytest.mark.parametrize("judge", ["", *(name for name in JUDGES if name != "random")])
def test_every_block_view_and_route(compare, judge):
    joint = {"train.schedule": "joint", "adversarial.generated_views": 0.5}
    made = tiny.context(tiny.config(**({} if judge else joint)))
    variables = tiny.state(made).search_variables()
    networks = dataclasses.replace(made.networks, view_names=SECOND)
    route = Route(judge, EVERY_VIEW) if judge else None
    # The restored view is drawn where D finds damage.
    assert type(networks.generator) is InpaintingGenerator
    with parallel.lowered_for(accelerator=True):
        session = compare(search_function(networks, variables, tiny.SIDE, route), tiny.SIDE)
    assert session.get_inputs()[0].shape == ["rows", tiny.SIDE, tiny.SIDE, 3]
    assert session.get_outputs()[0].shape[0] == "rows"


@pytest.mark.parametrize("judge", [None, "", "damage"])
def test_a_query_is_restored_as_in_search(compare, judge):
    """As a block, always, and for the half of the queries with the most damage."""
    made = tiny.context(tiny.config(**{"generator.name": "inpainting"}))
    networks, variables = made.networks, tiny.state(made).search_variables()
    views = tiny.batch(8)["image"]
    images = jnp.asarray(views / 255, jnp.float32)
    with parallel.lowered_for(accelerator=True):
        restored, damage = (jax.jit(each)(variables, images)
                            for each in (networks.restore, networks.damage))  # fmt: skip
        assert np.abs(restored - images).max() > 0.1
        half = (("original", 0.0), ("restored", -float(jnp.median(damage.mean((1, 2))))))
        offsets = {"": (("restored", 0.0),), "damage": half}
        fusion = (
            Fusion.of({"restored": 1.0})
            if judge is None
            else Fusion.of({"global": 1.0}, Route(judge, offsets[judge]))
        )
        function, given = package.network(networks, variables, fusion), package.named(variables)
        compare(lambda x: function(given, x), tiny.SIDE, 1e-4, views)


OPERATIONS = {
    "max_pool": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 0), (0, 1), (0, 0))
    ),
    "sum_pool": lambda x: lax.reduce_window(
        x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (0, 2), (0, 0))
    ),
    "convolution": lambda x: lax.conv_general_dilated(
        x, jnp.arange(3 * 2 * 3 * 6, dtype=jnp.float32).reshape(3, 2, 1, 18) / 100, (2, 1),
        ((0, 1), (1, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3,
    ),
    "small_log1p": lambda x: jnp.log(jnp.log1p(jnp.exp(-20 * x))),
    "erfc": lambda x: lax.erfc(4 * x - 2),
    "compared": lambda x: jnp.where(x < 0.3, 1 / x.clip(0.1), jnp.where(x >= 0.7, -x, x != 0.5)),
    "attention": lambda x: jnp.einsum("bhwc,bhvc->bhwv", x, jnp.abs(x - 0.5)),
    "clipped": lambda x: clip_unit(3 * x - 1),
    "turned": lambda x: x[:, 1:][:, :, ::-1][..., ::-1] ** 2.5,
    "placed": lambda x: jnp.concatenate([x[:, 2], x[:, -1, :, :]], axis=1),
    "edges": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0)), mode="edge"),
    "repeated": lambda x: jnp.broadcast_to(jnp.arange(3.0), (x.shape[0], 3)) * x.mean((1, 2)),
    "divided": lambda x: jnp.concatenate(jnp.split(jnp.concatenate([x, 2 * x]), 2)[::-1], axis=3),
    "sorted_weights": lambda x: x * jnp.sort(jnp.asarray([0.5, 0.1, 0.3])),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(compare, name):
    """Including operations on constants, which are computed during the conversion."""

    def function(views):
        found = OPERATIONS[name](views.astype(jnp.float32) / 255)
        return found.reshape(found.shape[0], -1)

    compare(function)


def test_unused_operations_are_left_out(compare, runtime):
    import onnx  # pyright: ignore[reportMissingImports]

    heavy = np.ones((SIDE * SIDE * 3, 1000), np.float32)

    def function(views):
        flat = (views / 255).reshape(views.shape[0], -1)
        unused = flat @ heavy
        return flat + 0 * unused.shape[1]

    compare(function)
    content = onnx_graph.model(function, SIDE, {})
    assert len(content) < heavy.nbytes / 10
    assert "MatMul" not in {node.op_type for node in onnx.load_from_string(content).graph.node}


def test_unsupported_operations_are_refused(runtime):
    with pytest.raises(UserError, match=r"as ONNX: primitive 'sort' is not supported$"):
        onnx_graph.model(lambda x: jnp.sort(x.astype(jnp.float32)), SIDE, {})
    with pytest.raises(UserError, match=r"cannot be written as ONNX: it has transposed"):
        onnx_graph.model(
            lambda x: lax.conv_transpose(x / 255, jnp.ones((2, 2, 3, 3)), (2, 2), "SAME"), SIDE, {}
        )


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"an ONNX file needs onnx \(pip install 'afa\[onnx\]'\)"):
        onnx_graph.model(lambda x: x, SIDE, {})


def test_command(runtime, tiny_finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(package, "_distance", lambda *_: None)  # tested in test_package
    out = tmp_path / "package"
    assert command.main([f"--run={tiny_finished}", f"--out={out}", "--onnx"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("  onnx         batch size any, float32: ")
    assert float(last.split()[5]) < 1e-5
    manifest = json.loads((out / "manifest.json").read_text())
    assert "predictor.onnx" in manifest["files"]
    about = runtime.InferenceSession(out / "predictor.onnx").get_modelmeta().custom_metadata_map
    assert about["checkpoint"] == manifest["checkpoint"]
    assert json.loads(about["preprocessing"]) == manifest["preprocessing"]


@pytest.mark.slow
@pytest.mark.parametrize("family", list(backbones.FAMILIES))
def test_every_family(compare, family):
    name = next(iter(backbones.FAMILIES[family]))
    member = backbones.member(name)
    size = next(n for n in range(64, 129, 16) if n >= member.smallest and n % member.multiple == 0)
    config = with_changes(
        ExperimentConfig(),
        **{"backbone.name": name, "data.image_size": size, "train.precision": "float32",
           "backbone.head": "none" if family == "vgg" else "imagenet",  # of vgg it is 500 MB
           "backbone.remat": family == "resnet", "embedder.standardise": True,
           "discriminator.spectral_norm": True},
    )  # fmt: skip
    draw = np.random.default_rng(0)

    def fill(path, leaf):
        noise = draw.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return noise * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        start = {"power": 3.0, "bias": 0.0, "clean_mean": 0.0}.get(path[-1].key, 1.0)
        return np.float32(start) + np.float32(0.1) * np.abs(noise)

    with parallel.lowered_for(accelerator=True):
        networks = build_networks(config, 3)
        shapes = jax.eval_shape(lambda: networks.init(jax.random.key(0), size))
        variables = jax.tree.map(jnp.asarray, jax.tree.map_with_path(fill, shapes))
        compare(search_function(networks, variables, size), size)
