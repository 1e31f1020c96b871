"""A small gallery for the tests of indexes, and the answers it must give."""

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
    """Rows of four classes, with text or whole numbers as ids."""
    numbered = range(first, first + rows)
    return Records.of(
        vectors(rows, seed),
        [7 * i - 5 for i in numbered] if numbers else [f"é/{i}" for i in numbered],
        [CLASSES[i % len(CLASSES)] for i in numbered],
        [f"images/{i}.jpg" for i in numbered],
    )


def expected(queries, gallery, k, allowed=None):
    """The ids and scores that comparing with every row gives."""
    scores = queries @ gallery.vectors.T
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return gallery.ids[order], np.take_along_axis(scores, order, axis=1)


def agree(found, wanted, tolerance=1e-5):
    """Asserts that results are these ids with these scores."""
    ids, scores = wanted
    np.testing.assert_allclose(found.scores, scores, atol=tolerance)
    assert found.ids.tolist() == ids.tolist()
