"""Makes `debug` tiny in every Python process that has this folder in PYTHONPATH.

For tests of notebooks, whose runs start in processes of their own.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import tiny_run

from afa.config import with_changes
from experiments.configs import debug

SIZES = {
    name: value
    for name, value in tiny_run.SETTINGS.items()
    if name not in ("exp", "data.name", "data.batch_size", "data.validation_fraction")
}
original = debug.config
debug.config = lambda laptop: with_changes(original(laptop), **SIZES)
