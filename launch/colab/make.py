"""Writes every notebook from its source: `python launch/colab/make.py`.

A source is a Python file in jupytext's percent format; the notebook beside it has the same cells
and no outputs. The cell `install` of all notebooks is the file `install.py`.
"""

import sys
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent
NAMES = ("quickstart", "your_pictures", "tpu_training", "sweep_results")
INSTALL = "# %% [install]\n"


def text(name: str) -> str:
    """Returns the content of a notebook file."""
    source = (HERE / f"{name}.py").read_text("utf-8")
    install = (HERE / "install.py").read_text("utf-8").partition('"""\n\n')[2]
    notebook = jupytext.reads(source.replace(INSTALL, f"# %%\n{install}"), fmt="py:percent")
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"  # else random, and different every time
    notebook.metadata = nbformat.from_dict({
        "accelerator": "TPU", "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    })  # fmt: skip
    return nbformat.writes(notebook) + "\n"


def main() -> None:
    """Writes all notebooks."""
    for name in NAMES:
        (HERE / f"{name}.ipynb").write_text(text(name), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
