"""What every command does alike: nearest names, pipes that close, machines without devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from afa import parallel
from afa.errors import EXIT_CLOSED_PIPE, EXIT_USER_ERROR, UserError
from experiments import cli, evaluate, index, search
from launch import doctor


def start(*words, **settings):
    """A Python process of its own at the root of the project; what it did."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": ""}  # most output comes at the end
    environment = os.environ | fixed | settings.pop("environment", {})
    usual = {"stderr": subprocess.PIPE, "text": True, "timeout": 120, "cwd": ROOT}
    return subprocess.run([sys.executable, *words], env=environment, **usual | settings)


def unread(*words, **settings):
    """The same with a standard output that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return start(*words, stdout=writing, **settings)
    finally:
        os.close(writing)


# ---- pipes -------------------------------------------------------------------------------------

WAYS = {
    "at once": "print('x', flush=True); return 0",
    "at the end": "print('x'); return 0",
    "much": "[print('x' * 1000) for _ in range(1000)]; return 0",
    "table": "from afa.console import table; table('t', [['x']], ['c']); return 0",
    "rich": "import rich; rich.print('x'); return 0",
    "before a mistake": "print('x'); raise UserError('a mistake')",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_pipe_that_nobody_reads_ends_quietly(way):
    code = f"""
import sys
from afa.errors import UserError
from experiments.cli import guarded
def command():
    {WAYS[way]}
sys.exit(guarded(command))
"""
    done = unread("-c", code)
    told = "error: a mistake\n" if "mistake" in way else ""
    assert (done.returncode, done.stderr) == (EXIT_CLOSED_PIPE, told)


def test_messages_that_nobody_reads_end_quietly():
    """`2>&1 | head -1`"""
    code = "from experiments.cli import *; sys.exit(guarded(lambda: note('x') or 0))"
    assert unread("-c", code, stderr=subprocess.STDOUT).returncode == EXIT_CLOSED_PIPE


def test_the_lists_and_helps_of_commands_end_quietly():
    done = unread("-m", "experiments.run", "--exp=list")
    assert (done.returncode, done.stderr) == (EXIT_CLOSED_PIPE, "")
    done = unread("-m", "experiments.search", "--help")
    assert (done.returncode, done.stderr) == (EXIT_CLOSED_PIPE, "")


def test_another_broken_pipe_is_no_quiet_end():
    """As of a rendering process that died."""
    with pytest.raises(BrokenPipeError):
        cli.guarded(lambda: (_ for _ in ()).throw(BrokenPipeError()))


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words", "line"),
    [
        (search, ["--jsn", "x.jpg"], "--jsn is not an option; did you mean '--json'?"),
        (search, ["--result=3", "x.jpg"], "--result is not an option; did you mean '--results'?"),
        (search, ["--false-matches=0.1", "x"],
         "--false-matches is not an option; did you mean '--false_matches'?"),
        (search, ["--results=x", "x.jpg"], "--results='x' is no whole number"),
        (index, ["bild"],
         "ACTION='bild' is unknown; did you mean 'build'? (allowed: build, add, remove, info, "
         "tune, verify)"),
        (index, ["build", "--rnu=r", "--images=p", "--out=o"],
         "--rnu is not an option; did you mean '--run'?"),
        (index, ["tune", "--index=i", "--target_recall=high"],
         "--target_recall='high' is no number"),
        (index, ["tune", "--index=i", "--target_recall=0.9", "--tune_for=singel"],
         "--tune_for='singel' is unknown; did you mean 'single'? (allowed: batch, single)"),
        (evaluate, ["--run=r", "--benchmark=inshop", "--pth=p"],
         "--pth is not an option; did you mean '--path'?"),
    ],
)  # fmt: skip
def test_a_misspelt_option_gets_the_nearest(command, words, line, capsys):
    assert command.main(words) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    program = f"{command.PROGRAM} tune" if words[0] == "tune" else command.PROGRAM
    assert (out, err) == ("", f"error: {line} ({program} --help lists the options)\n")


def test_words_behind_two_dashes_are_no_options(tmp_path, capsys):
    assert search.main([f"--run={tmp_path}", "--", "--jsn"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: --run={tmp_path}: holds no run")


@pytest.mark.parametrize("place", ["/proc/figures.json", "/nowhere/figures.json", "/tmp"])
def test_out_that_cannot_be_written_is_told_first(place, capsys):
    words = ["--run=r", "--benchmark=folder", "--path=p", f"--out={place}"]
    assert evaluate.main(words) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: --out: {place}: ") and err.count("\n") == 1


def test_a_mistake_is_one_line(capsys):
    def command():
        raise UserError("new\nline.jpg: cannot be read")

    assert cli.guarded(command) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: new\\nline.jpg: cannot be read\n"


# ---- devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("nonsense", "JAX_PLATFORMS=nonsense: Unable to initialize backend 'nonsense'"),
        ("cuda", "JAX_PLATFORMS=cuda: "),
    ],
)
def test_devices_that_are_not_there(asked, line, tmp_path):
    if asked == "cuda" and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    words = ["-m", "experiments.run", "--exp=debug", f"--workdir={tmp_path}/run"]
    scale = "--scale=full" if asked == "cuda" else "--scale=auto"
    done = start(*words, scale, environment={"JAX_PLATFORMS": asked}, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (EXIT_USER_ERROR, "")
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.endswith("; usable here: cpu\n") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_any_command_tells_that_devices_are_not_there():
    """Whatever JAX raised, and wherever."""
    code = """
import sys
import jax
from experiments.cli import guarded
sys.exit(guarded(lambda: jax.devices() and 0))
"""
    done = start("-c", code, environment={"JAX_PLATFORMS": "nonsense"})
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.startswith("error: JAX_PLATFORMS=nonsense: ")
    assert done.stderr.endswith("; usable here: cpu\n")


def test_the_doctor_tells_that_devices_are_not_there(monkeypatch):
    def refuse():
        raise UserError("JAX_PLATFORMS=cuda: no such device; usable here: cpu")

    monkeypatch.setattr(parallel, "require_devices", refuse)
    said = []
    assert doctor.examine(said.append) == EXIT_USER_ERROR
    assert said[-1] == "error: JAX_PLATFORMS=cuda: no such device; usable here: cpu"
