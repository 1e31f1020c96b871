"""Notebooks: equal to their sources, without outputs, and executed with FAST."""

import importlib.util
import json
import os
import sys
import warnings

import jax
import pytest
from paths import ROOT

HOME = ROOT / "launch" / "colab"
pytest.importorskip("jupytext", reason="notebooks need the extra dev")
SPEC = importlib.util.spec_from_file_location("make_notebooks", HOME / "make.py")
assert SPEC and SPEC.loader
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)
STARTUP = ROOT / "tests" / "support" / "startup"  # the networks of `debug` are tiny there
notebooks = pytest.mark.parametrize("name", make.NAMES)


@notebooks
def test_a_notebook_is_that_of_its_source(name):
    stored = (HOME / f"{name}.ipynb").read_text("utf-8")
    assert stored == make.text(name), "python launch/colab/make.py writes it anew"
    cells = json.loads(stored)["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert any("KEPT = " in "".join(cell["source"]) for cell in cells)


@notebooks
def test_a_notebook_is_executed(name, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter
        import nbclient
        import nbformat

        monkeypatch.setenv("FAST", "1")
        monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (STARTUP, ROOT))))
        monkeypatch.setenv("XLA_FLAGS", "")  # one device, not the several of the tests
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        for setting in ("compilation_cache_dir", "persistent_cache_min_compile_time_secs"):
            monkeypatch.setenv(f"JAX_{setting.upper()}", str(jax.config.values[f"jax_{setting}"]))
        notebook = nbformat.read(HOME / f"{name}.ipynb", as_version=4)
        client = nbclient.NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": tmp_path}},
        )
        client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}
    assert kinds & {"text/markdown", "image/png", "image/jpeg", "image/svg+xml", "text/html"}


def test_without_a_source_the_installation_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="Set SOURCE in this cell to the address of the afa"):
        exec((HOME / "install.py").read_text("utf-8"), {})


def test_the_installation_keeps_the_versions_of_the_runtime(tmp_path, monkeypatch):
    called = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    import subprocess

    monkeypatch.setattr(
        subprocess, "run",
        lambda command, **_: called.append(command) or subprocess.CompletedProcess(command, 0),
    )  # fmt: skip
    exec((HOME / "install.py").read_text("utf-8").replace('SOURCE = ""', 'SOURCE = "x.whl"'), {})
    assert called == [[sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", "x.whl"]]
    from importlib import metadata

    kept = (tmp_path / "kept.txt").read_text().splitlines()
    assert f"jax=={metadata.version('jax')}" in kept and f"flax=={metadata.version('flax')}" in kept
