"""Every command answers `--help`, by itself and as `afa COMMAND`."""

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


def answered(main, *words):
    """Exit code of a command."""
    try:
        return main(list(words))
    except SystemExit as ended:  # argparse and tyro end so after --help
        return ended.code or 0


def test_all_are_found():
    assert len(FOUND) > len(entry.COMMANDS)
    named = {module for module, _ in entry.COMMANDS.values()}
    assert named == {name for name in FOUND if "benchmarks" not in name and "__" not in name}


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    assert answered(importlib.import_module(name).main, "--help") == 0
    out, err = capsys.readouterr()
    assert "usage: " in out and "--help" in out and not err


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_help_by_the_common_name(name, capsys):
    assert answered(entry.main, name, "--help") == 0
    assert entry.COMMANDS[name][0] in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_list_of_commands(words, capsys):
    assert answered(entry.main, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert listed.keys() == entry.COMMANDS.keys()
    assert all(len(line) <= 100 and len(line.split()) > 3 for line in listed.values())


def test_a_command_that_there_is_not(capsys):
    assert answered(entry.main, "serach", "x.jpg") == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: COMMAND='serach' is unknown; did you mean 'search'? (allowed: ")


def test_the_words_and_the_exit_code_are_the_commands_own(monkeypatch, capsys):
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
