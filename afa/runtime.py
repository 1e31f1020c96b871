"""The host process: memory of steps on the CPU, and the cache of compiled programs."""

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import warnings
from importlib import metadata
from pathlib import Path

import jax

from afa import parallel
from afa.io import PROGRAM_CACHE, cache_home, expanded

PROGRAM_CACHE_BYTES = 2 * 2**30  # beyond this size the least recently used programs are deleted

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep_memory() -> None:
    """Lets steps on the CPU reuse the memory of the previous step; call it before JAX is asked for
    devices.

    A step allocates its working memory in one block. glibc maps a block of that size anew each
    time, and the kernel fills it page by page: a quarter of the time of a ResNet-18 step. With
    these settings the heap keeps the memory. It is the heap of the main thread, so programs run in
    the calling thread. No effect with accelerators or other C libraries.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not parallel.accelerated():
        _glibc("mallopt", M_MMAP_MAX, 0)
        _glibc("mallopt", M_TRIM_THRESHOLD, -1)  # never


def keep_programs() -> None:
    """Keeps compiled programs on disk for later processes (JAX's persistent compilation cache).

    Call it before anything is compiled. The environment variable `PROGRAM_CACHE` names the
    directory; "auto": `programs` in the cache directory, "off": no cache. Each JAX version,
    processor and set of XLA flags has its own subdirectory, so a program compiled for another one
    is never loaded. A damaged entry is compiled again.

    Raises:
      UserError: the directory starts with ~ and there is no home directory.
    """
    chosen = os.environ.get(PROGRAM_CACHE, "auto")
    if chosen == "off":
        return
    root = cache_home() / "programs" if chosen == "auto" else expanded(PROGRAM_CACHE, chosen)
    folder = root / f"jax-{jax.__version__}-{_machine()[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # without a cache, only slower
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_max_size", PROGRAM_CACHE_BYTES)
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation")


def _machine() -> str:
    """Returns a digest of what a compiled program depends on, besides its code and devices."""
    flags = ""
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = [jax.__version__, metadata.version("jaxlib"), platform.machine(), flags]
    parts += [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def forget_programs() -> None:
    """Frees all compiled programs. Each uses memory maps, and Linux allows 65,530 per process;
    about ten runs in one process reach this limit, and XLA then ends it without a message."""
    jax.clear_caches()
    gc.collect()
    _glibc("malloc_trim", 0)  # memory kept by `keep_memory`


def _glibc(function: str, *numbers: int) -> None:
    """Calls a function of the C library if it exists there."""
    with contextlib.suppress(AttributeError, TypeError):  # musl; Windows has no process handle
        getattr(ctypes.CDLL(None), function)(*numbers)
