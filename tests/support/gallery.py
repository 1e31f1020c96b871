"""A small gallery for tests of indexes, and the expected results."""

import numpy as np

from afa.retrieval.exact import normalise
from afa.retrieval.records import Records

DIMENSION = 8
MANIFEST = {"configuration": {}, "checkpoint": "step-5", "preprocessing": {"size": 64}}
CLASSES = ("cup", "jug", "pot", 'a "quoted" näme \\')


def vectors(rows, seed=0, dimension=DIMENSION):
    random = np.random.default_rng(seed)
    return normalise(random.normal(size=(rows, dimension)).astype(np.float32))


def records(rows=300, seed=0, first=0, numbers=False):
    """Returns records of four classes, with strings or integers as ids."""
    numbered = range(first, first + rows)
    return Records.of(
        vectors(rows, seed),
        [7 * i - 5 for i in numbered] if numbers else [f"é/{i}" for i in numbered],
        [CLASSES[i % len(CLASSES)] for i in numbered],
        [f"images/{i}.jpg" for i in numbered],
    )


def expected(queries, gallery, k, allowed=None):
    """Returns ids and scores of an exhaustive search."""
    scores = queries @ gallery.vectors.T
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return gallery.ids[order], np.take_along_axis(scores, order, axis=1)


def agree(results, expected, tolerance=1e-5):
    """Asserts that results have these ids and scores."""
    ids, scores = expected
    np.testing.assert_allclose(results.scores, scores, atol=tolerance)
    assert results.ids.tolist() == ids.tolist()
