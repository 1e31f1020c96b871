"""The public names of `import afa`, their examples, and their use with a run."""

import dataclasses
import doctest
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from paths import ROOT
from PIL import Image

import afa
from afa.config import with_changes
from afa.data.images import decode
from afa.errors import UserError
from afa.retrieval.export import read_export
from afa.runs import start
from afa.serving import package
from experiments import configs

TESTED_HERE = {"run", "sweep", "load", "__version__"}  # without doctest: they need a run


def python(code: str, where: Path = ROOT) -> str:
    """Runs code in a new Python process in the folder `where`; returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=where, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_afa_imports_no_large_package():
    code = "import sys, afa; print(*(n for n in ('jax', 'numpy', 'flax') if n in sys.modules))"
    assert python(code) == "\n"


def test_the_public_names():
    assert len(afa.__all__) <= 30 and sorted(afa.__all__) == afa.__all__
    assert set(afa.__all__) <= set(dir(afa))
    names: dict[str, object] = {}
    exec("from afa import *", names)
    assert set(afa.__all__) <= names.keys()
    with pytest.raises(AttributeError, match="module 'afa' has no attribute 'nothing'"):
        _ = afa.nothing  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", [name for name in afa.__all__ if name != "__version__"])
def test_a_public_name_is_documented_and_its_example_runs(name):
    text = inspect.getdoc(getattr(afa, name))
    assert text
    example = doctest.DocTestParser().get_doctest(text, {}, f"afa.{name}", None, 0)
    assert bool(example.examples) != (name in TESTED_HERE)
    output: list[str] = []
    assert doctest.DocTestRunner().run(example, out=output.append).failed == 0, "".join(output)


def test_every_metric_and_loss_is_documented():
    documented = [getattr(afa.metrics, name) for name in afa.metrics.__all__]
    assert all(each.__doc__ for each in (*documented, *afa.losses.LOSSES.values()))


def test_a_package_has_only_the_names_that_its_code_needs(tmp_path):
    package._write_code(tmp_path)
    code = "import afa; print(afa.__file__); print(afa.UserError.__name__, hasattr(afa, 'load'))"
    path, rest = python(code, tmp_path).splitlines()
    assert Path(path) == tmp_path / "afa" / "__init__.py" and rest == "UserError False"


# ---- a run -------------------------------------------------------------------------------------


def test_experiment_of_a_run(tmp_path, monkeypatch):
    """A recipe by name, or a configuration with the name of its directory."""
    monkeypatch.setattr(start, "execute", lambda *given: {"given": given})
    config = dataclasses.replace(afa.ExperimentConfig(), seed=3)
    changes: dict[str, Any] = {"data.image_size": 64}
    given = afa.run(config, workdir=tmp_path / "mine", **changes)["given"]
    assert given == ("mine", with_changes(config, **changes), tmp_path / "mine")
    assert afa.run("debug")["given"] == ("debug", configs.find("debug")(True), Path("runs/debug"))
    name, full, home = afa.run("baseline_resnet18", workdir="w", scale="full")["given"]
    assert (name, home) == ("baseline_resnet18", Path("w"))
    assert full == configs.find("baseline_resnet18")(False)


@pytest.mark.parametrize(
    ("exp", "settings", "line"),
    [
        (afa.ExperimentConfig(), {}, "workdir is missing: a configuration has no name"),
        (afa.ExperimentConfig(), {"scale": "full"}, "scale='full' is of recipes"),
        ("debug", {"scale": "ful"}, "scale='ful' is unknown; did you mean 'full'"),
        (afa.ExperimentConfig(), {"workdir": "w", "data.image_sise": 3},
         r"data\.image_sise is not a field; did you mean 'data\.image_size'"),
    ],
)  # fmt: skip
def test_errors_in_a_call(exp, settings, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line):
        afa.run(exp, **settings)
    assert tiny_run.listing(tmp_path) == {}


def test_vectors_of_a_finished_run(tiny_finished):
    """`afa.load(run).embed` gives the vectors in the gallery of the run."""
    trained = afa.load(tiny_finished)
    index = afa.open_index(tiny_finished / "embeddings")
    gallery, _ = read_export(tiny_finished / "embeddings")
    paths = [Path(path) for path in gallery.paths[:3]]
    vectors = trained.embed(paths)
    assert vectors.shape == (3, index.dimension) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors, gallery.vectors[:3], atol=1e-5)
    found = index.search(vectors, k=1)
    assert found.ids[:, 0].tolist() == gallery.ids[:3].tolist()
    np.testing.assert_allclose(found.scores, 1, atol=1e-4)
    for one in (str(paths[0]), paths[0], paths[:1]):
        np.testing.assert_allclose(trained.embed(one), vectors[:1], atol=1e-5)


def test_vectors_of_pixels_are_those_of_their_files(tiny_finished, tmp_path):
    trained = afa.load(tiny_finished)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), np.uint8)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, each in zip(paths, pixels, strict=True):
        Image.fromarray(each).save(path)
    vectors = trained.embed(paths)
    np.testing.assert_array_equal(trained.embed(list(pixels)), vectors)
    np.testing.assert_array_equal(trained.embed(pixels), vectors)
    np.testing.assert_array_equal(trained.embed(pixels[0]), trained.embed(paths[0]))


def test_images_that_cannot_be_embedded(tiny_finished, tiny_data, tmp_path):
    trained = afa.load(str(tiny_finished))
    path = next((tiny_data / "test").rglob("*.jpg"))
    pixels = decode(path.read_bytes())
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    allowed = r"\(allowed: files alone, or uint8 arrays of shape \(h, w, 3\) alone\)"
    for given, line in [
        ([], "images: there is none"),
        (tmp_path / "no.jpg", r"no\.jpg: there is no such file"),
        ([path, text], r"text\.jpg: cannot be read"),
        (tmp_path, "there is no such file"),
        ([path, pixels], rf"images\[0\] is a (Posix|Windows)Path {allowed}"),
    ]:
        with pytest.raises(UserError, match=line):
            trained.embed(given)


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (np.zeros((4, 4), np.uint8), r"images\[0\] is uint8 of shape \(4, 4\) \(allowed"),
        (np.zeros((4, 4, 4), np.uint8), r"images\[0\] is uint8 of shape \(4, 4, 4\) \(allowed"),
        (np.zeros((0, 4, 3), np.uint8), r"images\[0\] is uint8 of shape \(0, 4, 3\) \(allowed"),
        (np.zeros((4, 4, 3), np.float32), r"images\[0\] is float32 of shape \(4, 4, 3\) \(allo"),
        (3, r"images\[0\] is a int \(allowed"),
    ],
)
def test_arrays_that_are_not_images(image, line):
    from afa.inference.load import _check_pixels

    with pytest.raises(UserError, match=line):
        _check_pixels("images[0]", image)


def test_a_directory_without_a_run(tmp_path):
    with pytest.raises(UserError, match="contains no run"):
        afa.load(tmp_path)
    with pytest.raises(UserError):
        afa.open_index(tmp_path)
    assert tiny_run.listing(tmp_path) == {}
