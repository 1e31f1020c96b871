"""AFA-SVR: adversarial feature augmented single-view image retrieval, in JAX.

    result = afa.run("afa_resnet18", workdir="runs/first")
    vectors = afa.load("runs/first").embed(["a.jpg", "b.jpg"])       (2, d), unit length
    results = afa.open_index("runs/first/embeddings").search(vectors, k=10)

The names in `__all__` are public; everything else may change. Each is imported at its first use, so
`import afa` takes no time and JAX is not loaded before it is needed.
"""

import importlib
import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afa import losses
    from afa.config import ExperimentConfig
    from afa.errors import TrainingDiverged, UserError
    from afa.evaluation import metrics
    from afa.inference.load import TrainedEmbedder
    from afa.models.backbones import names as backbones
    from afa.retrieval.index import load as open_index
    from afa.runs.start import run
    from afa.sweeps.start import sweep
    from afa.train.loop import Preempted

    load = TrainedEmbedder.load

__version__ = "0.1.0"

__all__ = [
    "ExperimentConfig", "Preempted", "TrainingDiverged", "UserError", "__version__", "backbones",
    "load", "losses", "metrics", "open_index", "run", "sweep",
]  # fmt: skip

# Name -> its module, and its name there ("": the module itself).
_HOMES = {
    "ExperimentConfig": ("afa.config", "ExperimentConfig"),
    "Preempted": ("afa.train.loop", "Preempted"),
    "TrainingDiverged": ("afa.errors", "TrainingDiverged"),
    "UserError": ("afa.errors", "UserError"),
    "backbones": ("afa.models.backbones", "names"),
    "load": ("afa.inference.load", "TrainedEmbedder.load"),
    "losses": ("afa.losses", ""),
    "metrics": ("afa.evaluation.metrics", ""),
    "open_index": ("afa.retrieval.index", "load"),
    "run": ("afa.runs.start", "run"),
    "sweep": ("afa.sweeps.start", "sweep"),
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'afa' has no attribute {name!r}")
    home, inside = _HOMES[name]
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("afa."):
            raise
        # A packed run carries this file, but not the code for training and search.
        raise AttributeError(f"afa.{name} is not here: {error.name} is missing") from None
    value = operator.attrgetter(inside)(module) if inside else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
