"""The host process: memory of steps on the CPU, and compiled programs."""

import contextlib
import ctypes
import gc

import jax

from afa import parallel

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
