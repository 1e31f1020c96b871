"""Cache of compiled programs on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from afa import io, runtime

PROGRAM = """
import jax, jax.numpy as jnp
from jax._src import monitoring
from afa import io, runtime

hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name))
runtime.keep_programs()
x = jnp.arange(12.0).reshape(3, 4)
print(jax.jit(lambda x: jnp.tanh(x @ x.T).sum())(x).tobytes().hex())
print(sum(name.endswith("cache_hits") for name in hits))
"""


def compiled(where: Path | str, **environment: str) -> tuple[str, int]:
    """Runs PROGRAM in a new process; returns the bits of its result and its cache hits."""
    fixed = {"PYTHONPATH": str(ROOT), io.PROGRAM_CACHE: str(where), "PYTHONWARNINGS": "error"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**inherited, **fixed, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    bits, hits = done.stdout.split()
    return bits, int(hits)


def entries(where: Path) -> list[Path]:
    return [path for path in where.rglob("*-cache") if path.is_file()]


def test_the_second_process_uses_the_programs_of_the_first(tmp_path):
    first, second = compiled(tmp_path), compiled(tmp_path)
    assert first[1] == 0 and second[1] > 0
    assert first[0] == second[0] == compiled("off")[0]


def test_a_damaged_program_is_compiled_again(tmp_path):
    expected, _ = compiled(tmp_path)
    for path in entries(tmp_path):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    assert compiled(tmp_path) == (expected, 0)


def test_other_flags_have_other_programs(tmp_path):
    compiled(tmp_path)
    other = compiled(tmp_path, XLA_FLAGS="--xla_cpu_enable_fast_math=false")
    assert other[1] == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_no_cache_when_off_or_not_writable(tmp_path, monkeypatch):
    assert compiled("off")[1] == compiled("off")[1] == 0
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert compiled(blocked)[1] == 0


@pytest.mark.parametrize("name", ["jax", "processor"])
def test_the_directory_depends_on_the_machine(name, monkeypatch):
    before = runtime._machine()
    if name == "jax":
        monkeypatch.setattr(runtime.jax, "__version__", "0.0.1")
    else:
        monkeypatch.setattr(runtime.platform, "machine", lambda: "another")
    assert runtime._machine() != before
