"""Shared by all tests: shapes and types checked at run time, and a compilation cache."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before anything imports afa: every jaxtyping signature is checked on every call.
install_import_hook("afa", "beartype.beartype")

import jax  # noqa: E402

from afa import io, runtime  # noqa: E402

CACHE = Path(os.environ.get("AFA_TEST_CACHE", Path(tempfile.gettempdir()) / "afa-test-cache"))
runtime.keep_memory()  # as every run does
os.environ[io.PROGRAM_CACHE] = "off"  # the tests use their own directory
jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Frees compiled programs after each module; their number per process is limited."""
    yield
    runtime.forget_programs()


@pytest.fixture(scope="session")
def synthetic_cache() -> Path:
    """Directory of the synthetic data sets of all tests."""
    return CACHE / "data"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images for minimal runs (`tiny_run`)."""
    import tiny_run

    folder = tiny_run.shared(tmp_path_factory) / "tiny_data"
    with tiny_run.once(folder) as first:
        if first:
            tiny_run.images(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished run; tests must not change it."""
    import tiny_run

    return tiny_run.finished(tiny_data, tmp_path_factory)


@pytest.fixture
def tiny_copy(tiny_finished: Path, tmp_path: Path) -> Path:
    """Copy of a finished run that a test may change."""
    return Path(shutil.copytree(tiny_finished, tmp_path / "moved"))


@pytest.fixture(scope="module")
def unoptimised() -> Iterator[None]:
    """Disables compiler optimisations, for tests too short to profit from them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
