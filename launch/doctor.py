"""Checks whether a run can start on this machine: `python -m launch.doctor`.

Checks versions, devices, memory, disk and the directory of data. Started as a run will be, on all
machines of a cluster, it also checks that the processes find each other, that their devices can
communicate, and their clocks. Exit code 0 and a last line `ready` if everything is available, else
2 and one line for each thing that is missing.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from afa.errors import EXIT_USER_ERROR, UserError
from afa.io import cache_home, require_writable
from experiments.cli import Parser, perform

PROGRAM = "python -m launch.doctor"
GIB = 2**30
MIN_DISK = 2 * GIB  # synthetic data, checkpoints and embeddings of a small run
MIN_MEMORY = 4 * GIB
MAX_SKEW = 5.0  # seconds between the clocks of two machines
# ScaNN is optional: without it, search is exact.
REQUIRED = ("jax", "flax", "optax", "orbax.checkpoint", "grain", "tensorflow_datasets", "pyarrow",
            "cv2", "simplejpeg")  # fmt: skip
OPTIONAL = ("scann", "tensorflow")


def imported(module: str) -> str:
    """Returns `ok`, or the reason why the module cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def devices() -> str:
    """Returns the devices that JAX uses.

    Raises:
      UserError: JAX cannot use the requested devices.
    """
    from afa import parallel

    parallel.require_devices()
    return parallel.platform()


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    options.add_argument(
        "--coordinator", default="auto",
        help="as launch.coordinator of a run: how several processes find each other",
    )  # fmt: skip
    options.add_argument("--processes", type=int, default=1, help="as launch.processes")
    options.add_argument("--index", type=int, default=0, help="as launch.index")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(
        parser, lambda chosen: examine(chosen.coordinator, chosen.processes, chosen.index), words
    )


def examine(
    coordinator: str = "auto",
    processes: int = 1,
    index: int = 0,
    print_line: Callable[[str], None] = print,
) -> int:
    """Prints one line per check; returns the exit code."""
    errors = [*_machine(print_line), *_modules(print_line)]
    if not errors:
        try:
            errors += _devices(coordinator, processes, index, print_line)
        except UserError as error:
            errors.append(str(error))
    for error in errors:
        print_line(f"error: {error}")
    if not errors:
        print_line("ready")
    return EXIT_USER_ERROR if errors else 0


def _machine(print_line: Callable[[str], None]) -> Iterator[str]:
    """Prints Python, memory and disk; yields errors."""
    print_line(
        f"{'python':<20}{platform.python_version()} ({sys.executable}) on {platform.machine()}, "
        f"{os.cpu_count()} cores"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print_line(f"{'memory':<20}{memory / GIB:.1f} GiB")
    if memory < MIN_MEMORY:
        yield f"less than {MIN_MEMORY / GIB:.0f} GiB of memory: use a larger machine"
    free = shutil.disk_usage(Path.cwd()).free
    print_line(f"{'disk':<20}{free / GIB:.1f} GiB free here")
    if free < MIN_DISK:
        yield f"less than {MIN_DISK / GIB:.0f} GiB of disk is free: remove files, or work elsewhere"
    data = cache_home()
    try:
        require_writable(data, "data and compiled programs")
        print_line(f"{'data':<20}{data}")
    except UserError as error:
        yield f"{error}: set HOME to a directory that is"


def _modules(print_line: Callable[[str], None]) -> Iterator[str]:
    """Prints the versions of the libraries; yields errors."""
    for module in REQUIRED + OPTIONAL:
        found = imported(module)
        status = version(module) if found == "ok" else found
        print_line(f"{module:<20}{status}" + ("" if module in REQUIRED else " (optional)"))
        if found != "ok" and module in REQUIRED:
            yield f"{module} cannot be imported: install the project again"


def _devices(
    coordinator: str, processes: int, index: int, print_line: Callable[[str], None]
) -> Iterator[str]:
    """Joins the other processes, if any, and prints the devices of all; yields errors."""
    from afa import parallel

    print_line(f"{'port':<20}{free_port()} is free")
    parallel.start(coordinator, processes, index)
    print_line(f"{'devices':<20}{devices()}")
    count = parallel.process_count()
    if count > 1:
        print_line(f"{'process':<20}{parallel.process_index()} of {count}")
        skew = parallel.clock_skew()
        print_line(f"{'clocks':<20}{skew:.2f} s apart at most")
        if skew > MAX_SKEW:
            yield f"the clocks of the machines differ by {skew:.0f} s: synchronise them (NTP)"
    total, expected = parallel.device_sum(), parallel.device_count()
    print_line(f"{'sum over devices':<20}{total} of {expected}")
    if total != expected:
        yield f"the devices cannot communicate: they add up to {total}, not {expected}"


def free_port() -> int:
    """Returns a port on which this machine can be the coordinator."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def version(module: str) -> str:
    """Returns the version of the package that contains a module."""
    packages = importlib.metadata.packages_distributions().get(module.partition(".")[0], [])
    for package in packages:
        if package.replace("-", "_").replace("_headless", "").startswith(module.replace(".", "_")):
            return importlib.metadata.version(package)
    return importlib.metadata.version(packages[0]) if packages else "present"


if __name__ == "__main__":
    sys.exit(main())
