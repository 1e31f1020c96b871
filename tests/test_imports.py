"""Layers: a module imports only from lower layers. Also limits the length of files and functions.

Imports are read from the source (`ast`), including those in functions and under TYPE_CHECKING.
"""

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

# From the lowest to the highest layer.
AFA = (
    "errors", "io", "console", "bounds", "losses", "config", "checks", "manifest", "workdir",
    "launchers", "parallel", "runtime", "unpickle", "report", "data", "models", "train",
    "inference", "retrieval", "evaluation", "serving", "runs", "sweeps",
)  # fmt: skip
LAYERS = (*(f"afa.{name}" for name in AFA), "afa", "experiments", "launch")
# Allowed imports from higher layers, with reasons.
UPWARDS = {
    ("afa.runs.start", "experiments.configs"):
        "recipes are data; afa imports only the one that the user names",
}  # fmt: skip
MOST_LINES, MOST_FUNCTION = 500, 60
# Allowed longer functions, with reasons.
LONG = {
    "afa/train/loop.py: train":
        "one loop in which the order matters: step, check, log, evaluate, save, stop",
}  # fmt: skip

Import = tuple[int, str]  # line, and the module


@functools.cache
def modules() -> dict[str, Path]:
    """Returns module name -> path for all modules of the project."""
    found = {}
    for package in ("afa", "experiments", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.Module, known: frozenset[str]) -> Iterator[Import]:
    """Yields line and name of the project modules that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            names = [f"{node.module}.{each.name}" for each in node.names]
            if node.module == "afa":  # defined before all lazy imports
                names = [name for name in names if name != "afa.__version__"]
        else:
            continue
        for name in names:
            owner = name if name in known else name.rpartition(".")[0]
            if owner.partition(".")[0] in ("afa", "experiments", "launch"):
                yield node.lineno, owner


@functools.cache
def graph() -> dict[str, list[Import]]:
    """Returns module -> its imports from the project."""
    known = frozenset(modules())
    return {
        name: list(imports(ast.parse(path.read_text(encoding="utf-8")), known))
        for name, path in modules().items()
    }


def layer(module: str) -> str | None:
    """Returns the layer of a module, or None."""
    parts = module.split(".")
    name = ".".join(parts[:2]) if parts[0] == "afa" else parts[0]
    return name if name in LAYERS else None


def upward(module: str, imported: list[Import]) -> list[str]:
    """Returns the imports of a module from higher layers."""
    own = LAYERS.index(layer(module) or "")
    return [
        f"{module}, line {line}: {target}"
        for line, target in imported
        if LAYERS.index(layer(target) or "") > own and (module, target) not in UPWARDS
    ]


def cycle(edges: dict[str, list[Import]]) -> list[str]:
    """Returns an import cycle, with equal first and last module; [] if there is none."""
    try:
        graphlib.TopologicalSorter(
            {name: {target for _, target in found} for name, found in edges.items()}
        ).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_module_belongs_to_a_layer():
    assert [name for name in modules() if layer(name) is None] == []
    assert {layer(name) for name in modules()} == set(LAYERS)


def test_imports_run_downwards():
    assert [line for name, found in graph().items() for line in upward(name, found)] == []


def test_no_modules_import_each_other():
    # The public names of `afa` are lazy, and modules read only `afa.__version__`.
    found = {name: [e for e in edges if (name, e[1]) not in UPWARDS]
             for name, edges in graph().items()}  # fmt: skip
    assert cycle(found) == []


def test_allowed_upward_imports_are_used_and_inside_functions():
    for name, target in UPWARDS:
        assert target in {each for _, each in graph()[name]}
        tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
        top = ast.Module(
            [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []
        )
        assert target not in {each for _, each in imports(top, frozenset(modules()))}


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("afa.data.images", "from afa.report.page import Page", []),
        ("afa.report.page", "from afa.data import images", ["afa.data.images"]),
        ("afa.report.page", "import afa.runs.run as job", ["afa.runs.run"]),
        ("afa.train.loop", "def f():\n    from afa.evaluation import metrics",
         ["afa.evaluation.metrics"]),
        ("afa.data.images", "if TYPE_CHECKING:\n    from afa.runs.run import run",
         ["afa.runs.run"]),
        ("afa.runs.run", "import experiments.cli", ["experiments.cli"]),
        ("afa.runs.run", "from experiments import configs", ["experiments.configs"]),
        ("afa.runs.run", "import afa", ["afa"]),
        ("afa.runs.run", "from afa import run", ["afa"]),
        ("afa.runs.run", "from afa import __version__", []),
        ("experiments.run", "import afa", []),
    ],
)  # fmt: skip
def test_detection_of_upward_imports(module, line, found):
    """Checks the parsing that the tests above rely on."""
    read = list(imports(ast.parse(line), frozenset(modules())))
    assert [each.rpartition(": ")[2] for each in upward(module, read)] == found


def test_a_cycle_is_found():
    edges = {"a": [(1, "b")], "b": [(1, "c")], "c": [(1, "a")]}
    assert set(cycle(edges)) == {"a", "b", "c"} and cycle({"a": [(1, "b")], "b": []}) == []


# ---- lengths -----------------------------------------------------------------------------------


def sources() -> list[Path]:
    return [*modules().values(), *(ROOT / "tests").rglob("*.py")]


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yields name and number of lines of every function, including methods and decorators."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(node.lineno, *(each.lineno for each in node.decorator_list), node.lineno)
            yield node.name, (node.end_lineno or first) - first + 1


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {str(path): lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_is_too_long_except_the_allowed_ones():
    long = {
        f"{path.relative_to(ROOT).as_posix()}: {name}"
        for path in sources()
        for name, lines in functions(path.read_text(encoding="utf-8"))
        if lines > MOST_FUNCTION
    }
    assert long == LONG.keys()
    assert all(LONG.values())


def test_the_length_of_functions():
    source = "@a\n@b\ndef f(\n    x,\n):\n    def g():\n        pass\n    return g\n"
    assert dict(functions(source)) == {"f": 8, "g": 2}
