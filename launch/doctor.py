"""Checks whether a run can start on this machine: `python -m launch.doctor`.

Exit code 0 if everything that a run needs is available, else 2.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from afa.errors import EXIT_USER_ERROR, UserError
from experiments.cli import Parser, perform

PROGRAM = "python -m launch.doctor"
GIB = 2**30
MIN_DISK = 2 * GIB  # synthetic data, checkpoints and embeddings of a small run
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
    """Returns the parser of the command line, which has no options but --help."""
    return Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[0])


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, lambda _: examine(), words)


def examine(print_line: Callable[[str], None] = print) -> int:
    """Prints one line per check; returns the exit code."""
    print_line(
        f"{'python':<20}{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
    )
    free = shutil.disk_usage(Path.cwd()).free
    print_line(f"{'disk':<20}{free / GIB:.1f} GiB free here")
    missing = []
    for module in REQUIRED + OPTIONAL:
        found = imported(module)
        status = version(module) if found == "ok" else found
        print_line(f"{module:<20}{status}" + ("" if module in REQUIRED else " (optional)"))
        if found != "ok" and module in REQUIRED:
            missing.append(module)
    without_devices = ""
    if "jax" not in missing:
        try:
            print_line(f"{'devices':<20}{devices()}")
        except UserError as error:
            without_devices = str(error)
            print_line(f"{'devices':<20}none")
    if without_devices:
        print_line(f"error: {without_devices}")
    if missing:
        print_line(f"error: {', '.join(missing)} cannot be imported; install the project again")
    if free < MIN_DISK:
        print_line(f"error: less than {MIN_DISK / GIB:.0f} GiB of disk is free")
    return EXIT_USER_ERROR if missing or without_devices or free < MIN_DISK else 0


def version(module: str) -> str:
    """Returns the version of the package that contains a module."""
    packages = importlib.metadata.packages_distributions().get(module.partition(".")[0], [])
    for package in packages:
        if package.replace("-", "_").replace("_headless", "").startswith(module.replace(".", "_")):
            return importlib.metadata.version(package)
    return importlib.metadata.version(packages[0]) if packages else "present"


if __name__ == "__main__":
    sys.exit(main())
