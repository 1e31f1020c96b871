"""The host process: memory of steps on the CPU, and compiled programs."""

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

PROGRAM_CACHE_BYTES = 2 * 2**30  # the programs used longest ago are removed beyond that

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep_memory() -> None:
    """Lets steps on the CPU reuse the memory of the step before; best called before anything else
    asks JAX for devices.

    A step takes its working memory in one piece. glibc maps a piece of that size anew each time,
    and the kernel then fills it page by page: a quarter of the time of a ResNet-18 step. Here the
    heap keeps it instead. That heap is the main thread's, so a program must run in the thread that
    calls it. Accelerators have memory of their own; other C libraries are left as they are.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not parallel.accelerated():
        _glibc("mallopt", M_MMAP_MAX, 0)
        _glibc("mallopt", M_TRIM_THRESHOLD, -1)  # never


def keep_programs() -> None:
    """Keeps compiled programs on disk for later processes (JAX's persistent compilation cache).

    Best called before anything is compiled. Where: the variable `PROGRAM_CACHE` of the environment;
    "auto" is `programs` in the cache directory, "off" keeps nothing. A directory of its own for
    every JAX, processor and set of XLA flags: a program compiled for another one is never loaded.
    A damaged entry is compiled again.

    Raises:
      UserError: the directory begins with ~ and there is no home directory.
    """
    chosen = os.environ.get(PROGRAM_CACHE, "auto")
    if chosen == "off":
        return
    root = cache_home() / "programs" if chosen == "auto" else expanded(PROGRAM_CACHE, chosen)
    folder = root / f"jax-{jax.__version__}-{_machine()[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # compiling again is slower, and nothing else
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_max_size", PROGRAM_CACHE_BYTES)
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation")


def _machine() -> str:
    """Digest of what a compiled program depends on beside its code and its devices."""
    flags = ""
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = [jax.__version__, metadata.version("jaxlib"), platform.machine(), flags]
    parts += [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def forget_programs() -> None:
    """Frees all compiled programs. Each holds memory maps, of which Linux allows a process 65,530;
    some ten runs in one process come to that, and XLA then ends it without a word."""
    jax.clear_caches()
    gc.collect()
    _glibc("malloc_trim", 0)  # what `keep_memory` kept for them


def _glibc(function: str, *numbers: int) -> None:
    """Calls a function of the C library, if it is one that has it."""
    with contextlib.suppress(AttributeError, TypeError):  # musl; Windows has no process handle
        getattr(ctypes.CDLL(None), function)(*numbers)
