"""Fusion of scores with the class posterior: do the two images belong to one training class?

The probability that two images, each assigned to a class by its own posterior, get the same one
is the dot product of their posteriors. It knows training classes alone.
"""

import numpy as np
from jaxtyping import Float32, Int64

from afa.retrieval.rerank.contract import ImageFeatures, ImageScorer


def class_agreement(gallery: ImageFeatures) -> ImageScorer:
    """Evidence of the posteriors, for every gallery row."""

    def score(
        queries: ImageFeatures, exclude: Int64[np.ndarray, "q"]
    ) -> Float32[np.ndarray, "q n"]:
        return queries.posterior @ gallery.posterior.T

    return score
