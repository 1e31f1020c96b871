"""Common to all commands: unknown options, closed pipes, machines without devices."""

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
    """Runs Python in a new process in the project root; returns the completed process."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": ""}  # most output is written at the end
    environment = os.environ | fixed | settings.pop("environment", {})
    usual = {"stderr": subprocess.PIPE, "text": True, "timeout": 120, "cwd": ROOT}
    return subprocess.run([sys.executable, *words], env=environment, **usual | settings)


def unread(*words, **settings):
    """As `start`, with a standard output whose reader is closed."""
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
    "before an error": "print('x'); raise UserError('an error')",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_closed_pipe_ends_the_command_quietly(way):
    code = f"""
import sys
from afa.errors import UserError
from experiments.cli import guarded
def command():
    {WAYS[way]}
sys.exit(guarded(command))
"""
    done = unread("-c", code)
    expected = "error: an error\n" if "error" in way else ""
    assert (done.returncode, done.stderr) == (EXIT_CLOSED_PIPE, expected)


def test_a_closed_pipe_of_messages_ends_the_command_quietly():
    """`2>&1 | head -1`"""
    code = "from experiments.cli import *; sys.exit(guarded(lambda: note('x') or 0))"
    assert unread("-c", code, stderr=subprocess.STDOUT).returncode == EXIT_CLOSED_PIPE


def test_a_closed_pipe_of_list_and_help_ends_quietly():
    done = unread("-m", "experiments.run", "--exp=list")
    assert (done.returncode, done.stderr) == (EXIT_CLOSED_PIPE, "")
    done = unread("-m", "experiments.search", "--help")
    assert (done.returncode, done.stderr) == (EXIT_CLOSED_PIPE, "")


def test_another_broken_pipe_is_raised():
    """Such as that of a rendering process that ended early."""
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
        (search, ["--results=x", "x.jpg"], "--results='x' is not a whole number"),
        (index, ["bild"],
         "ACTION='bild' is unknown; did you mean 'build'? (allowed: build, add, remove, info, "
         "tune, verify)"),
        (index, ["build", "--rnu=r", "--images=p", "--out=o"],
         "--rnu is not an option; did you mean '--run'?"),
        (index, ["tune", "--index=i", "--target_recall=high"],
         "--target_recall='high' is not a number"),
        (index, ["tune", "--index=i", "--target_recall=0.9", "--tune_for=singel"],
         "--tune_for='singel' is unknown; did you mean 'single'? (allowed: batch, single)"),
        (evaluate, ["--run=r", "--benchmark=inshop", "--pth=p"],
         "--pth is not an option; did you mean '--path'?"),
    ],
)  # fmt: skip
def test_unknown_options_suggest_the_nearest_name(command, words, line, capsys):
    assert command.main(words) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    program = f"{command.PROGRAM} tune" if words[0] == "tune" else command.PROGRAM
    assert (out, err) == ("", f"error: {line} ({program} --help lists the options)\n")


def test_words_after_two_dashes_are_not_options(tmp_path, capsys):
    assert search.main([f"--run={tmp_path}", "--", "--jsn"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: --run={tmp_path}: contains no run")


@pytest.mark.parametrize("path", ["/proc/figures.json", "/nowhere/figures.json", "/tmp"])
def test_unwritable_output_is_an_error_before_any_work(path, capsys):
    words = ["--run=r", "--benchmark=folder", "--path=p", f"--out={path}"]
    assert evaluate.main(words) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: --out: {path}: ") and err.count("\n") == 1


def test_an_error_is_one_line(capsys):
    def command():
        raise UserError("new\nline.jpg: cannot be read")

    assert cli.guarded(command) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: new\\nline.jpg: cannot be read\n"


# ---- devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "line"),
    [
        ("nonsense", "JAX_PLATFORMS=nonsense: Unable to initialize backend 'nonsense'"),
        ("cuda", "JAX_PLATFORMS=cuda: "),
    ],
)
def test_missing_devices_are_an_error(platform, line, tmp_path):
    if platform == "cuda" and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    words = ["-m", "experiments.run", "--exp=debug", f"--workdir={tmp_path}/run"]
    scale = "--scale=full" if platform == "cuda" else "--scale=auto"
    done = start(*words, scale, environment={"JAX_PLATFORMS": platform}, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (EXIT_USER_ERROR, "")
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.endswith("; usable here: cpu\n") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_devices_are_reported_by_any_command():
    """For any exception of JAX."""
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


def test_missing_devices_are_reported_by_the_doctor(monkeypatch):
    def refuse():
        raise UserError("JAX_PLATFORMS=cuda: no such device; usable here: cpu")

    monkeypatch.setattr(parallel, "require_devices", refuse)
    lines = []
    assert doctor.examine(print_line=lines.append) == EXIT_USER_ERROR
    assert lines[-1] == "error: JAX_PLATFORMS=cuda: no such device; usable here: cpu"
