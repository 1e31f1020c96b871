"""Re-ranking in a search, with the settings chosen on validation classes and saved with the run.

Only methods that need descriptors alone are available, because an index stores nothing else.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from afa.errors import UserError, choose
from afa.io import write_json
from afa.retrieval.index.contract import Index, Results
from afa.retrieval.index.local import LocalIndex
from afa.retrieval.rerank import METHODS, word

FILE = "rerank.json"
SERVED = {word(name): name for name in METHODS if name != "plain"}

# queries (unit vectors), k -> the k best gallery rows and the scores of the method.
Ranker = Callable[[np.ndarray, int], Results]


def save(run: Path, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Saves the settings of the methods that a search can use.

    Args:
      run: directory of a finished run.
      settings: method -> settings chosen on validation classes.

    Returns:
      Names of the saved methods, as typed.
    """
    kept = {word(name): dict(values) for name, values in settings.items() if name in METHODS}
    kept.pop("plain", None)
    write_json(run / FILE, _stored(run) | kept)
    return list(kept)


def ranker(run: Path, index: Index, name: str) -> Ranker:
    """Returns a function that ranks the gallery of an index by a re-ranking method.

    Args:
      run: directory of the run with the saved settings.
      index: gallery embedded by the run.
      name: name of the method, as typed.

    Raises:
      UserError: no such method, no saved settings, or an index that does not store its vectors
        locally.
    """
    method = METHODS[choose("--rerank", name, SERVED)]
    stored = _stored(run)
    if name not in stored:
        raise UserError(
            f"--rerank={name}: its settings were not chosen yet; experiments.rerank "
            f"--run={shlex.quote(str(run))} "
            "chooses them on validation classes"
        )
    if not isinstance(index, LocalIndex):
        raise UserError(f"--rerank={name}: {index.uri} does not store its vectors locally")
    records = index.records()
    score = method.reranker(records.vectors, **stored[name])

    def rank(queries: np.ndarray, k: int) -> Results:
        if not 1 <= k <= len(records):
            raise UserError(f"k={k} is not between 1 and {len(records)}, the images in the index")
        scores = np.asarray(score(queries, np.full(len(queries), -1)))
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return Results(records.ids[rows], np.take_along_axis(scores, rows, axis=1))

    return rank


def _stored(run: Path) -> dict[str, Any]:
    path = run / FILE
    try:
        stored = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
        raise UserError(f"{path} is damaged: it contains no settings of methods")
    return stored
