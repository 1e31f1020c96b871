"""A re-ranker at work: settings that validation classes chose, kept with the run, used by a search.

Only methods that need descriptors alone are served: an index holds nothing else of its images.
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

# queries (unit vectors), k -> the k best of the gallery, and scores that are no cosines.
Ranker = Callable[[np.ndarray, int], Results]


def save(run: Path, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keeps the settings of the methods that can be served; returns their names as they are typed.

    Args:
      run: directory of a finished run.
      settings: method -> what was chosen on validation classes.
    """
    kept = {word(name): dict(values) for name, values in settings.items() if name in METHODS}
    kept.pop("plain", None)
    write_json(run / FILE, _stored(run) | kept)
    return list(kept)


def ranker(run: Path, index: Index, name: str) -> Ranker:
    """Ranks the gallery of an index by a method, prepared once.

    Args:
      run: whose settings are used.
      index: of vectors that the run made.
      name: of the method, as it is typed.

    Raises:
      UserError: no such method, one whose settings were not chosen yet, or an index whose vectors
        are elsewhere.
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
        raise UserError(f"--rerank={name}: {index.uri} keeps its vectors elsewhere")
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
        raise UserError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
        raise UserError(f"{path} is damaged: it holds no settings of methods")
    return stored
