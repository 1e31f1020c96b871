"""All commands under one name: `afa COMMAND ARGUMENTS`, or `python -m launch COMMAND ARGUMENTS`.

Exit codes are those of the command; 2 where there is no such command.
"""

import importlib
import sys
from collections.abc import Sequence

from afa.errors import choose
from experiments.cli import guarded

# Command -> its module, imported when it is asked for, and what it does.
COMMANDS = {
    "run": ("experiments.run", "train, evaluate, export, index and report one experiment"),
    "search": ("experiments.search", "the images of a gallery that are most similar to an image"),
    "index": ("experiments.index", "make and keep an index over images of your own"),
    "evaluate": ("experiments.evaluate", "a trained run on a public benchmark"),
    "rerank": ("experiments.rerank", "what re-ranking gains with a trained run"),
    "compare": ("experiments.compare", "two runs, or several seeds of two, on the same queries"),
    "weights": ("experiments.weights", "list, check and export published weights"),
    "package": ("experiments.package", "pack a run for a service"),
    "doctor": ("launch.doctor", "whether this machine is fit for a run"),
}


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    return guarded(lambda: _main(words), after_signal="goes on or begins anew")


def _main(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print("usage: afa COMMAND ARGUMENTS\n\nCommands (afa COMMAND --help says more):")
        for name, (_, line) in COMMANDS.items():
            print(f"  {name:<10}{line}")
        return 0
    module, _ = choose("COMMAND", words[0], COMMANDS)
    return importlib.import_module(module).main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
