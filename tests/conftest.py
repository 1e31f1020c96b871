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
os.environ[io.PROGRAM_CACHE] = "off"  # the tests have a directory of their own
jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Frees a module's compiled programs, of which a process can hold only so many."""
    yield
    runtime.forget_programs()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked gpu is skipped, with a reason, where JAX has only the CPU."""
    if jax.default_backend() == "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no accelerator"))


@pytest.fixture(scope="session")
def synthetic_cache() -> Path:
    """Where synthetic data sets of the tests are built, once for all of them."""
    return CACHE / "data"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images for the smallest complete runs (`tiny_run`)."""
    import tiny_run

    folder = tiny_run.shared(tmp_path_factory) / "tiny_data"
    with tiny_run.once(folder) as mine:
        if mine:
            tiny_run.images(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished run, not to be changed."""
    import tiny_run

    return tiny_run.finished(tiny_data, tmp_path_factory)


@pytest.fixture
def tiny_copy(tiny_finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may spoil."""
    return Path(shutil.copytree(tiny_finished, tmp_path / "moved"))


@pytest.fixture(scope="module")
def hasty() -> Iterator[None]:
    """For what does not run long enough to repay the compiler's optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
