"""Is this machine fit for a run? `python -m launch.doctor` prints what it finds.

Exit code 0 when everything a run needs is there, else 2.
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
LEAST_DISK = 2 * GIB  # synthetic set, checkpoints and embeddings of a small run
# ScaNN is wanted, not needed: exact search stands in for it.
NEEDED = ("jax", "flax", "optax", "orbax.checkpoint", "grain", "tensorflow_datasets", "pyarrow",
          "cv2", "simplejpeg")  # fmt: skip
WANTED = ("scann", "tensorflow")


def imported(module: str) -> str:
    """`ok`, or why the module cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken install raises whatever it likes
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def devices() -> str:
    """What JAX computes on.

    Raises:
      UserError: it cannot compute on what it was asked for.
    """
    from afa import parallel

    parallel.require_devices()
    return parallel.platform()


def parser() -> Parser:
    """The command's options: none but --help."""
    return Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[0])


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return perform(parser, lambda _: examine(), words)


def examine(say: Callable[[str], None] = print) -> int:
    """Says one line a finding; returns the exit code."""
    say(
        f"{'python':<20}{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
    )
    free = shutil.disk_usage(Path.cwd()).free
    say(f"{'disk':<20}{free / GIB:.1f} GiB free here")
    missing = []
    for module in NEEDED + WANTED:
        found = imported(module)
        told = version(module) if found == "ok" else found
        say(f"{module:<20}{told}" + ("" if module in NEEDED else " (optional)"))
        if found != "ok" and module in NEEDED:
            missing.append(module)
    without_devices = ""
    if "jax" not in missing:
        try:
            say(f"{'devices':<20}{devices()}")
        except UserError as error:
            without_devices = str(error)
            say(f"{'devices':<20}none")
    if without_devices:
        say(f"not fit: {without_devices}")
    if missing:
        say(f"not fit: {', '.join(missing)} cannot be imported; install the project again")
    if free < LEAST_DISK:
        say(f"not fit: less than {LEAST_DISK / GIB:.0f} GiB of disk is free")
    return EXIT_USER_ERROR if missing or without_devices or free < LEAST_DISK else 0


def version(module: str) -> str:
    """Version of the package that brings a module."""
    packages = importlib.metadata.packages_distributions().get(module.partition(".")[0], [])
    for package in packages:
        if package.replace("-", "_").replace("_headless", "").startswith(module.replace(".", "_")):
            return importlib.metadata.version(package)
    return importlib.metadata.version(packages[0]) if packages else "present"


if __name__ == "__main__":
    sys.exit(main())
