"""A run packed for a service: the same vectors without training code, and what is refused."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export
from paths import ROOT
from PIL import Image
from safetensors.numpy import load_file, save_file

from afa import parallel
from afa.config import DataConfig, ExperimentConfig, with_changes
from afa.data.images import UnreadableImage
from afa.data.pipeline import evaluation_view
from afa.data.types import Files, ImageSet
from afa.errors import UserError
from afa.inference.load import TrainedEmbedder
from afa.models import backbones
from afa.models.fusion import Fusion, Route
from afa.models.networks import build_networks
from afa.serving import package, predictor
from afa.serving.predictor import Predictor
from experiments import package as command

# All blocks of a fused vector.
EVERYTHING = Fusion.of(
    {"global": 1.0, "local": 0.5, "posterior": 0.25, "flip": 1.0, "restored": 0.75,
     "discriminator": 2.0},
    Route("discriminator", (("original", 0.1), ("restored", 0.0))),
)  # fmt: skip
TRAINING = {
    "flax", "optax", "orbax", "grain", "tensorflow", "tensorflow_datasets", "array_record", "scann",
    "pyarrow", "tyro", "rich", "tensorboardX", "experiments",
}  # fmt: skip
SIDE, DIMENSION = 16, 12 + 6 + 4 + 12 + 12 + 12


pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(scope="module")
def everything(tiny_finished, tmp_path_factory):
    """A finished run whose fused descriptor has all blocks."""
    run = Path(shutil.copytree(tiny_finished, tmp_path_factory.mktemp("package") / "run"))
    path = run / "embeddings" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fusion": EVERYTHING.to_json()}))
    return run


@pytest.fixture(scope="module")
def embedder(everything):
    return TrainedEmbedder.load(everything)


@pytest.fixture(scope="module")
def packed(everything):
    """Its package, not to be changed."""
    out = everything.parent / "packed"
    package.pack(everything, out, "float32")
    return out


@pytest.fixture
def moved(packed, tmp_path):
    """A package that a test may spoil, elsewhere."""
    return Path(shutil.copytree(packed, tmp_path / "some where" / "else"))


@pytest.fixture
def queries(tiny_data, tmp_path):
    """Image files of several kinds and shapes, and the same as an image set."""
    files = sorted(str(path) for path in tiny_data.rglob("*.jpg"))[::6][:18]
    for i, mode in enumerate(("L", "RGBA")):
        path = tmp_path / f"{mode}.png"
        with Image.open(files[i]) as image:
            image.convert(mode).resize((70, 50 - 20 * i)).save(path)
        files.append(str(path))
    count = len(files)
    return ImageSet(Files(files), np.zeros(count, np.int64), tuple(files), np.zeros(count, bool))


def rewritten(directory, **changes):
    """Changes fields of the manifest of a package."""
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replaced(directory, name, content):
    """Replaces a file of a package and its digest in the manifest."""
    (directory / name).write_bytes(content)
    files = json.loads((directory / "manifest.json").read_text())["files"]
    files[name]["sha256"] = hashlib.sha256(content).hexdigest()
    rewritten(directory, files=files)


# ---- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["cpu", "accelerator"])
def test_vectors_equal_those_of_search(packed, embedder, queries, family):
    served = Predictor.load(packed, family)
    wanted = embedder(queries)
    assert wanted.shape == (20, DIMENSION)
    for count in (1, 2, 3, 7, 20):
        found = served.embed_images(queries.images[:count])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted[:count], atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert served.embed_images([]).shape == (0, DIMENSION)


def test_views_equal_those_of_the_data_pipeline(moved, queries):
    """Also with a crop fraction below 1."""
    preprocessing = json.loads((moved / "manifest.json").read_text())["preprocessing"]
    rewritten(moved, preprocessing=preprocessing | {"crop_fraction": 0.5})
    served, config = Predictor.load(moved), DataConfig(image_size=SIDE, crop_fraction=0.5)
    for image in queries.images[-4:]:
        np.testing.assert_array_equal(served.view(image), evaluation_view(image, config))
        whole = evaluation_view(image, DataConfig(image_size=SIDE))
        assert not np.array_equal(served.view(image), whole)


def test_views_are_embedded_in_batches():
    """The largest batch size of which at least half is used; the last batch is padded."""
    views = np.arange(27, dtype=np.uint8).reshape(27, 1, 1, 1).repeat(3, axis=-1)

    def sizes(count, rows):
        blocks = list(predictor._blocks(views[:count], rows))
        np.testing.assert_array_equal(np.concatenate([b for _, b in blocks]), views[:count])
        return [(size, len(block)) for size, block in blocks]

    assert sizes(27, (1, 4, 16)) == [(16, 16), (16, 11)]
    assert sizes(7, (1, 4, 16)) == [(4, 4), (4, 3)]
    assert sizes(9, (1, 4, 16)) == [(16, 9)]
    assert sizes(1, (1, 4, 16)) == [(1, 1)]
    assert sizes(3, (8, 32)) == [(8, 3)]


def test_serves_without_training_code(packed, moved, embedder, queries):
    """A moved package imports its own copy of the code and no training libraries."""
    program = (
        "import json, sys; from afa.serving.predictor import Predictor;"
        "d = Predictor.load('.');"
        "read = lambda p: open(p, 'rb').read();"
        "vectors = d.embed_images([read(p) for p in sys.argv[1:]]).tolist();"
        "one = d.embed_images([read(sys.argv[1])]).tolist();"
        "ours = {n: m.__file__ for n, m in sys.modules.items() if n.startswith('afa')};"
        "print(json.dumps([vectors, one, ours, sorted({n.split('.')[0] for n in sys.modules})]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if libraries := os.environ.get("PYTHONPATH"):
        kept = (each for each in libraries.split(os.pathsep) if Path(each).resolve() != ROOT)
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    cache = str(jax.config.jax_compilation_cache_dir)  # pyright: ignore[reportAttributeAccessIssue]
    done = subprocess.run(
        [sys.executable, "-c", program, *queries.ids], cwd=moved, text=True, capture_output=True,
        env=environment | {"JAX_COMPILATION_CACHE_DIR": cache},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    vectors, one, ours, modules = json.loads(done.stdout)
    wanted = embedder(queries)
    np.testing.assert_allclose(vectors, wanted, atol=1e-5, rtol=0)
    np.testing.assert_allclose(one, wanted[:1], atol=1e-5, rtol=0)
    assert not TRAINING & set(modules)
    assert {"jax", "numpy"} <= set(modules)
    expected = {moved / "afa" / name for name in package.CODE}
    assert {Path(file) for file in ours.values()} == expected


def test_the_predictor_command(moved, embedder, queries, capsys):
    words = [f"--package={moved}", "--check", *queries.ids[-2:]]
    assert predictor.main(words) == 0
    out, err = capsys.readouterr()
    version, distance = err.splitlines()
    assert version.startswith(f"written by jax {jax.__version__}, read by {jax.__version__}. JAX")
    assert float(distance.split()[2]) < 1e-5
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["image"] for answer in answers] == list(queries.ids[-2:])
    wanted = embedder(queries)[-2:]
    found = [answer["vector"] for answer in answers]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
    broken = moved / "broken.jpg"
    broken.write_bytes(b"no image")
    assert predictor.main([f"--package={moved}", str(broken)]) == 2
    message = f"error: {broken}: is not a readable image (not an image of a known format)\n"
    assert capsys.readouterr() == ("", message)
    assert predictor.main([f"--package={moved}", str(moved / "no.jpg")]) == 2
    message = f"error: {moved / 'no.jpg'}: cannot be read (No such file or directory)\n"
    assert capsys.readouterr() == ("", message)


def test_check_finds_other_vectors(moved):
    served = Predictor.load(moved)
    assert served.check() < 1e-5
    known = load_file(moved / "check.safetensors")
    save_file(known | {"vectors": known["vectors"][::-1].copy()}, moved / "other.safetensors")
    replaced(moved, "check.safetensors", (moved / "other.safetensors").read_bytes())
    assert Predictor.load(moved).check([1]) > 1e-3


def test_bfloat16_vectors_are_close(embedder, packed):
    """The precision `auto` on an accelerator changes vectors only slightly."""
    weights = load_file(packed / "weights.safetensors")
    family = package._family(embedder, weights, True, "bfloat16")
    assert family.precision == "bfloat16"
    known = load_file(packed / "check.safetensors")
    found = np.asarray(family.programs["any"].call(weights, known["views"]))
    distance = np.linalg.norm(found - known["vectors"], axis=1)
    assert 1e-5 < distance.max() < package.COARSE


@pytest.mark.parametrize("family", list(backbones.FAMILIES))
def test_every_family_takes_any_number_of_images(family):
    """For accelerators; the programs are lowered and not run."""
    name = next(iter(backbones.FAMILIES[family]))
    member = backbones.member(name)
    size = next(n for n in range(64, 129, 16) if n >= member.smallest and n % member.multiple == 0)
    config = with_changes(
        ExperimentConfig(),
        **{"backbone.name": name, "data.image_size": size, "train.precision": "bfloat16",
           "evaluation.views": ("flip", "median", "standardise")},
    )  # fmt: skip
    with parallel.lowered_for(accelerator=True):
        networks = build_networks(config, 3)
        variables = jax.eval_shape(lambda: networks.init(jax.random.key(0), size))
        fusion = Fusion.of(dict.fromkeys(networks.block_names(), 1.0))
        network = package.network(networks, variables, fusion)
        rows = export.symbolic_shape("rows")[0]
        views = jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8)
        lower = export.export(jax.jit(network), platforms=package.ACCELERATORS)
        program = lower(package.named(variables), views)
    assert str(program.out_avals[0].shape[0]) == "rows"
    assert "stablehlo.convolution" in program.mlir_module()


# ---- content of a package ------------------------------------------------------------------------


def test_manifest(packed, everything):
    manifest = json.loads((packed / "manifest.json").read_text())
    exported = json.loads((everything / "embeddings" / "index.json").read_text())
    for name in ("experiment", "checkpoint", "step", "preprocessing", "configuration"):
        assert manifest[name] == exported[name]
    assert manifest["preprocessing"]["image_size"] == SIDE
    assert manifest["fusion"] == EVERYTHING.to_json()
    assert manifest["dimension"] == DIMENSION
    assert manifest["jax"] == jax.__version__
    present = {str(p.relative_to(packed)) for p in packed.rglob("*") if p.is_file()}
    assert present == {*manifest["files"], "manifest.json"}
    for name, file in manifest["files"].items():
        content = (packed / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["families"]["cpu"]["programs"].keys() == {"1", "4", "16"}
    assert manifest["families"]["accelerator"]["platforms"] == ["cuda", "rocm", "tpu", "cpu"]
    assert manifest["arguments"] == sorted(load_file(packed / "weights.safetensors"))
    versions = (packed / "requirements.txt").read_text().split()
    assert f"jax=={jax.__version__}" in versions
    assert not list(packed.parent.glob(".packed*"))


def test_programs_match_their_device(packed):
    """Convolutions are matrix products on the CPU and convolutions on accelerators."""
    for name, convolutions in (("cpu-4", False), ("accelerator", True)):
        program = export.deserialize(bytearray((packed / f"{name}.jax").read_bytes()))
        assert ("stablehlo.convolution" in program.mlir_module()) is convolutions


def test_unused_weights_are_left_out(packed, tiny_finished, embedder):
    names = set(load_file(packed / "weights.safetensors"))
    assert any(name.startswith("generator/") for name in names)
    assert not any("adversarial" in name for name in names)  # statistics of training needed
    assert not any("local_class_head" in name for name in names)
    embedder.fusion = Fusion.of({"global": 1.0})
    try:
        needed = package._needed_weights(embedder)
    finally:
        embedder.fusion = EVERYTHING
    assert needed.keys() < names
    assert {name.partition("/")[0] for name in needed} == {"embedder"}


def test_stablehlo_has_the_arguments_of_the_program(packed):
    """The arguments are the weights in the order of the manifest, then the views."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    manifest = json.loads((packed / "manifest.json").read_text())
    weights = load_file(packed / "weights.safetensors")
    shapes = [weights[name].shape for name in manifest["arguments"]] + [(4, SIDE, SIDE, 3)]
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        content = (packed / "cpu-4.stablehlo").read_bytes()
        module = stablehlo.deserialize_portable_artifact(context, content)
        (main,) = (op for op in module.body if str(op.attributes["sym_name"]) == '"main"')
        kinds = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
        found, out = (
            [tuple(ir.RankedTensorType(kind).shape) for kind in each]
            for each in (kinds.inputs, kinds.results)
        )
    assert found == shapes
    assert out == [(4, DIMENSION)]


def test_command(tiny_finished, tmp_path, capsys):
    out = tmp_path / "new" / "package"
    assert command.main([f"--run={tiny_finished}", f"--out={out}"]) == 0
    first, cpu, accelerator = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}: 17 files, ") and "step-12-" in first
    assert cpu.startswith("  cpu          batch size 1, 4, 16, float32: ")
    assert accelerator.startswith("  accelerator  batch size any, bfloat16: ")
    assert command.main([f"--run={tiny_finished}", f"--out={out}"]) == 2
    message = f"error: --out={out}: is not empty; name a new directory\n"
    assert capsys.readouterr() == ("", message)


# ---- errors --------------------------------------------------------------------------------------


def test_a_failed_write_leaves_nothing(everything, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(package, "write_json", full)
    out = tmp_path / "package"
    with pytest.raises(UserError, match=f"--out={out}: cannot be written .No space left on device"):
        package.pack(everything, out)
    assert list(tmp_path.iterdir()) == []


def test_a_package_with_different_vectors_is_not_written(everything, tmp_path, monkeypatch):
    known = package._check_data
    monkeypatch.setattr(
        package, "_check_data", lambda s: {n: a[::-1].copy() if n == "vectors" else a
                                      for n, a in known(s).items()},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"the programs for cpu are \d\.\de[+-]\d\d from the run's"):
        package.pack(everything, tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_runs_that_are_not_finished(tmp_path):
    with pytest.raises(UserError, match="contains no run"):
        package.pack(tmp_path, tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def refused(directory, line, family=None):
    with pytest.raises(UserError) as message:
        Predictor.load(directory, family)
    assert str(message.value) == line.format(directory)


def test_directories_without_a_package(tmp_path, everything, moved):
    refused(tmp_path, "{} contains no package: manifest.json is missing")
    refused(tmp_path / "no", "{} contains no package: manifest.json is missing")
    (tmp_path / "manifest.json").write_text('{"kind": "something"}')
    refused(tmp_path, "{} contains no package: manifest.json is not that of a package")
    (tmp_path / "manifest.json").write_text("[1]")
    refused(tmp_path, "{} contains no package: manifest.json is not that of a package")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read \(JSONDecodeError: .+\)$"):
        Predictor.load(tmp_path)


def test_packages_of_another_version(moved):
    rewritten(moved, format=2)
    refused(moved, "{} is a package of format 2, this version reads format 1")
    rewritten(moved, format=1, calling_convention=999, jax="9.9")
    least = export.minimum_supported_calling_convention_version
    most = export.maximum_supported_calling_convention_version
    refused(
        moved,
        "{} was written by jax 9.9 (calling convention 999), and jax "
        f"{jax.__version__} reads {least} to {most}: install that jax",
    )


@pytest.mark.parametrize("name", ["weights.safetensors", "cpu-4.jax", "check.safetensors"])
def test_changed_and_missing_files(moved, name):
    path = moved / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(moved, f"{{}}/{name} is not the file manifest.json names (sha256 differs)")
    path.unlink()
    refused(moved, f"{{}}/{name} cannot be read (No such file or directory)")


def test_programs_that_another_jax_wrote(moved):
    """Its own reader may refuse a program of an older or newer version."""
    replaced(moved, "cpu-4.jax", b"a program of another version")
    rewritten(moved, jax="0.6.0")
    with pytest.raises(UserError) as error:
        Predictor.load(moved)
    assert f"was written by jax 0.6.0, and jax {jax.__version__} cannot read it (" in str(
        error.value
    )
    assert "install jax 0.6.0, or package the run again. JAX promises to read" in str(error.value)


def test_files_of_another_kind(moved):
    weights = (moved / "weights.safetensors").read_bytes()
    replaced(moved, "cpu-4.jax", b"no program at all, but the digest fits")
    with pytest.raises(UserError, match=r"cpu-4\.jax is not a jax\.export program \(\w+\)$"):
        Predictor.load(moved)
    replaced(moved, "weights.safetensors", weights[:100])
    replaced(moved, "cpu-4.jax", (moved / "cpu-1.jax").read_bytes())
    with pytest.raises(UserError, match=r"weights\.safetensors is not a safetensors file \(.+\)$"):
        Predictor.load(moved)


def test_damaged_manifests(moved):
    manifest = json.loads((moved / "manifest.json").read_text())
    rewritten(moved, files=manifest["files"] | {"weights.safetensors": {}})
    refused(moved, "{}/manifest.json is damaged: KeyError('sha256')")
    escaping = {"../weights.safetensors": manifest["files"]["weights.safetensors"]}
    cpu = manifest["families"]["cpu"] | {"programs": {"1": "../weights.safetensors"}}
    families = manifest["families"] | {"cpu": cpu}
    rewritten(moved, files=manifest["files"] | escaping, families=families)
    refused(moved, "{}/manifest.json is damaged: '../weights.safetensors' is not one of its files")
    rewritten(moved, families={"cpu": []})
    refused(
        moved,
        "{}/manifest.json is damaged: "
        "TypeError('list indices must be integers or slices, not str')",
    )


def test_programs_for_another_platform(moved):
    refused(
        moved, "family='gpu' is unknown; did you mean 'cpu'? (allowed: accelerator, cpu)", "gpu"
    )
    families = json.loads((moved / "manifest.json").read_text())["families"]
    families["cpu"]["platforms"] = ["tpu"]
    rewritten(moved, families=families)
    refused(moved, "{}: its programs run on tpu, not on cpu")


def test_invalid_images_and_views(packed):
    served = Predictor.load(packed)
    with pytest.raises(UnreadableImage, match="empty file"):
        served.embed_images([b""])
    line = r"views of shape \(2, 8, 8, 3\) are not of shape \(n, 16, 16, 3\)"
    with pytest.raises(UserError, match=line):
        served.embed(np.zeros((2, 8, 8, 3), np.uint8))
