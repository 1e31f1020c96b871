"""Devices of this machine, asked in another process: JAX reserves those that it asks for, and the
runs of a sweep could not use them any more."""

import functools
import os
import subprocess
import sys

from afa.errors import UserError

PROGRAM = "import jax; print(jax.default_backend(), jax.local_device_count())"


@functools.cache
def found() -> tuple[str, int]:
    """Returns platform ("cpu", "gpu", "tpu") and number of devices of this machine.

    Raises:
      UserError: JAX cannot use its devices.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu", 1
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"JAX cannot use the devices of this machine: {reason[-1]}")
    platform, count = done.stdout.split()[-2:]
    return platform, int(count)


def scale_of(scale: str, executor: str) -> str:
    """Returns the scale of the runs: "auto" is resolved once, for the whole sweep.

    Raises:
      UserError: "auto" for runs on other machines.
    """
    if scale != "auto":
        return scale
    if executor != "local":
        raise UserError(
            f"scale='auto': the devices of {executor} are not known here (allowed: laptop, full)"
        )
    return "laptop" if found()[0] == "cpu" else "full"
