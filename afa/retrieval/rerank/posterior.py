"""Fusion of scores with the class posterior: do the two pictures belong to one training class?

The probability that two pictures, each assigned to a class by its own posterior, get the same one
is the dot product of their posteriors. It knows training classes alone.
"""

import numpy as np
from jaxtyping import Float32, Int64

from afa.retrieval.rerank.contract import Pictures, PictureScorer


def class_agreement(gallery: Pictures) -> PictureScorer:
    """Evidence of the posteriors, for every gallery row."""

    def score(queries: Pictures, exclude: Int64[np.ndarray, "q"]) -> Float32[np.ndarray, "q n"]:
        return queries.posterior @ gallery.posterior.T

    return score
