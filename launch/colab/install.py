"""The cell of every notebook that installs afa."""

# Installs afa and keeps the versions of JAX, Flax, NumPy, ... that the runtime has.
SOURCE = ""  # address of the repository ("git+https://..."), a folder, or a wheel

import importlib.util
import subprocess
import sys
from importlib import metadata

KEPT = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
if importlib.util.find_spec("afa") is None:
    if not SOURCE:
        raise SystemExit("Set SOURCE in this cell to the address of the afa repository.")
    installed = {each.metadata["Name"].lower(): each.version for each in metadata.distributions()}
    with open("kept.txt", "w") as file:
        file.writelines(f"{name}=={installed[name]}\n" for name in KEPT if name in installed)
    command = [sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", SOURCE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The installation failed:\n{done.stderr[-2000:]}")
