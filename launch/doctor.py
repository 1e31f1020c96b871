"""Checks whether a run can start on this machine: `python -m launch.doctor`.

Exit code 0 if everything that a run needs is available, else 2.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

GIB = 2**30
LEAST_DISK = 2 * GIB  # synthetic data, checkpoints and embeddings of a small run
# ScaNN is optional: without it, search is exact.
NEEDED = ("jax", "flax", "optax", "orbax.checkpoint", "grain", "tensorflow_datasets", "pyarrow",
          "cv2", "simplejpeg")  # fmt: skip
WANTED = ("scann", "tensorflow")


def imported(module: str) -> str:
    """Returns `ok`, or the reason why the module cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def devices() -> str:
    """Returns the devices that JAX uses."""
    from afa import parallel

    return parallel.platform()


def main(print_line: Callable[[str], None] = print) -> int:
    """Prints one line per check; returns the exit code."""
    print_line(
        f"{'python':<20}{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
    )
    free = shutil.disk_usage(Path.cwd()).free
    print_line(f"{'disk':<20}{free / GIB:.1f} GiB free here")
    missing = []
    for module in NEEDED + WANTED:
        found = imported(module)
        status = version(module) if found == "ok" else found
        print_line(f"{module:<20}{status}" + ("" if module in NEEDED else " (optional)"))
        if found != "ok" and module in NEEDED:
            missing.append(module)
    if "jax" not in missing:
        print_line(f"{'devices':<20}{devices()}")
    if missing:
        print_line(f"error: {', '.join(missing)} cannot be imported; install the project again")
    if free < LEAST_DISK:
        print_line(f"error: less than {LEAST_DISK / GIB:.0f} GiB of disk is free")
    return 2 if missing or free < LEAST_DISK else 0


def version(module: str) -> str:
    """Returns the version of the package that contains a module."""
    packages = importlib.metadata.packages_distributions().get(module.partition(".")[0], [])
    for package in packages:
        if package.replace("-", "_").replace("_headless", "").startswith(module.replace(".", "_")):
            return importlib.metadata.version(package)
    return importlib.metadata.version(packages[0]) if packages else "present"


if __name__ == "__main__":
    sys.exit(main())
