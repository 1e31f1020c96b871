"""Every command has `--help`, as a module and as `afa COMMAND`."""

import importlib
import pkgutil
import tomllib

import pytest
from paths import ROOT

import experiments
import launch
from afa.errors import EXIT_USER_ERROR
from experiments import search
from launch import __main__ as entry

FOUND = [
    each.name
    for package in (experiments, launch)
    for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not each.ispkg and "def main(" in (ROOT / f"{each.name.replace('.', '/')}.py").read_text()
]
COMMANDS = [*FOUND, "afa.serving.predictor"]


def exit_code(main, *words):
    """Runs a command; returns its exit code."""
    try:
        return main(list(words))
    except SystemExit as ended:  # raised by argparse and tyro after --help
        return ended.code or 0


def test_all_commands_are_listed():
    assert len(FOUND) > len(entry.COMMANDS)
    named = {module for module, _ in entry.COMMANDS.values()}
    assert named == {name for name in FOUND if "benchmarks" not in name and "__" not in name}


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    assert exit_code(importlib.import_module(name).main, "--help") == 0
    out, err = capsys.readouterr()
    assert "usage: " in out and "--help" in out and not err


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_help_of_afa_command(name, capsys):
    assert exit_code(entry.main, name, "--help") == 0
    assert entry.COMMANDS[name][0] in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_list_of_commands(words, capsys):
    assert exit_code(entry.main, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert listed.keys() == entry.COMMANDS.keys()
    assert all(len(line) <= 100 and len(line.split()) > 3 for line in listed.values())


def test_unknown_command_suggests_the_nearest_name(capsys):
    assert exit_code(entry.main, "serach", "x.jpg") == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: COMMAND='serach' is unknown; did you mean 'search'? (allowed: ")


def test_arguments_and_exit_code_are_passed_on(monkeypatch, capsys):
    monkeypatch.setattr(search, "main", lambda words: print(words) or 75)
    assert entry.main(["search", "--run=r", "x.jpg"]) == 75
    assert capsys.readouterr().out == "['--run=r', 'x.jpg']\n"
    monkeypatch.undo()
    assert entry.main(["search", "--jsn", "x.jpg"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith(
        "error: --jsn is not an option; did you mean '--json'?"
    )


def test_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["afa"].partition(":")
    assert getattr(importlib.import_module(module), function) is entry.main
