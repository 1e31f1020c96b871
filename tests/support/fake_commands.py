"""Installs commands of a cluster that functions of a test module stand in for."""

import sys
from pathlib import Path

import pytest
from paths import ROOT, SUPPORT

COMMAND = """#!{python}
import sys
sys.path.insert(0, {support!r})
import {module}
sys.exit({module}.{name}(sys.argv[1:], {directory!r}))
"""


def install(module: str, names: tuple[str, ...], home: Path, patch: pytest.MonkeyPatch) -> Path:
    """Makes `name` run the function of this name of a module of tests/support; it gets its words
    and the directory, in which it keeps its jobs. Returns the directory."""
    (home / "bin").mkdir(parents=True)
    (home / "jobs").mkdir()
    for name in names:
        path = home / "bin" / name
        path.write_text(
            COMMAND.format(python=sys.executable, support=str(SUPPORT), module=module, name=name,
                           directory=str(home))
        )  # fmt: skip
        path.chmod(0o755)
    patch.setenv("PATH", str(home / "bin"), prepend=":")
    patch.setenv("PYTHONPATH", str(ROOT))
    return home
