"""Agreement of class posteriors as evidence beside the similarity.

The dot product of two posteriors is the probability that both images are assigned to the same
training class.
"""

import numpy as np
from jaxtyping import Float32, Int64

from afa.retrieval.rerank.contract import ImageFeatures, ImageScorer


def class_agreement(gallery: ImageFeatures) -> ImageScorer:
    """Scores every gallery row by the dot product of the posteriors."""

    def score(
        queries: ImageFeatures, exclude: Int64[np.ndarray, "q"]
    ) -> Float32[np.ndarray, "q n"]:
        return queries.posterior @ gallery.posterior.T

    return score
