"""All commands under one name: `afa COMMAND ARGUMENTS`, or `python -m launch COMMAND ARGUMENTS`.

The exit code is that of the command; 2 for an unknown command.
"""

import importlib
import sys
from collections.abc import Sequence

from afa.errors import choose
from experiments.cli import guarded

# Command -> module, imported when the command is used, and description.
COMMANDS = {
    "run": ("experiments.run", "train, evaluate, export, index and report one experiment"),
    "sweep": ("experiments.sweep", "execute many runs: settings, values and seeds"),
    "results": ("experiments.results", "tables over many runs: intervals and differences"),
    "search": (
        "experiments.search",
        "find the images of a gallery that are most similar to an image",
    ),
    "index": ("experiments.index", "create and update an index of your own images"),
    "evaluate": ("experiments.evaluate", "evaluate a trained run on a benchmark"),
    "rerank": ("experiments.rerank", "compare re-ranking methods on a trained run"),
    "compare": (
        "experiments.compare",
        "compare two runs, or several seeds of each, on the same queries",
    ),
    "weights": ("experiments.weights", "list, check and export published weights"),
    "package": ("experiments.package", "package a run for a service"),
    "doctor": ("launch.doctor", "check whether a run can start on this machine"),
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return guarded(lambda: _main(words), after_signal="continues or starts again")


def _main(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print("usage: afa COMMAND ARGUMENTS\n\nCommands (see afa COMMAND --help):")
        for name, (_, line) in COMMANDS.items():
            print(f"  {name:<10}{line}")
        return 0
    module, _ = choose("COMMAND", words[0], COMMANDS)
    return importlib.import_module(module).main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
