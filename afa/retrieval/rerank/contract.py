"""Interface of a re-ranker, and the nearest neighbours that all methods use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Float32, Int, Int64

from afa.models.heads import LocalFeatures
from afa.retrieval import exact

# queries (unit vectors), exclude (gallery row that is the query itself, -1 for none) -> score of
# every gallery row, higher is better. The excluded row may have any score.
Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]

# gallery (unit vectors), settings -> scorer for this gallery.
Reranker = Callable[..., Scorer]


@dataclass(frozen=True)
class ImageFeatures:
    """Features of n images; a method uses those it needs.

    Attributes:
      vectors: descriptors of unit length.
      posterior: probabilities of the training classes; no columns if no method needs them.
      local_features: image scale -> strongest local features.
      multi_scale: (scales, power) -> multi-scale descriptors of unit length.
    """

    vectors: Float32[np.ndarray, "n d"]
    posterior: Float32[np.ndarray, "n classes"]
    local_features: Mapping[float, LocalFeatures] = field(default_factory=dict)
    multi_scale: Mapping[tuple[tuple[float, ...], float], np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, vectors: Float32[np.ndarray, "n d"]) -> "ImageFeatures":
        """Makes features with descriptors alone."""
        return cls(vectors, np.zeros((len(vectors), 0), np.float32))

    def rows(self, index: Int[np.ndarray, "m"] | slice) -> "ImageFeatures":
        """Selects the images at `index`."""
        parts = (self.vectors, self.posterior, dict(self.local_features), dict(self.multi_scale))
        return ImageFeatures(*jax.tree.map(lambda part: part[index], parts))


# As Scorer and Reranker, for methods that need more features than descriptors.
ImageScorer = Callable[[ImageFeatures, np.ndarray], np.ndarray]
ImageReranker = Callable[..., ImageScorer]


def of_vectors(reranker: Reranker) -> ImageReranker:
    """Adapts a re-ranker of descriptors to `ImageFeatures`."""

    def rerank(gallery: ImageFeatures, **settings: object) -> ImageScorer:
        score = reranker(gallery.vectors, **settings)
        return lambda queries, exclude: score(queries.vectors, exclude)

    return rerank


def neighbours(
    queries: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "n d"],
    k: int,
    exclude: Int64[np.ndarray, "q"] | None = None,
) -> tuple[Float32[np.ndarray, "q j"], Int64[np.ndarray, "q j"]]:
    """Returns similarities and gallery rows of the k nearest neighbours, or of all if fewer.

    Arguments as in `afa.retrieval.exact.topk`.
    """
    available = len(gallery) - (exclude is not None and bool(np.any(exclude >= 0)))
    return exact.topk(queries, gallery, min(k, available), exclude)


def own_neighbours(
    gallery: Float32[np.ndarray, "n d"], k: int
) -> tuple[Float32[np.ndarray, "n j"], Int64[np.ndarray, "n j"]]:
    """Returns the k nearest neighbours of every gallery row among the other rows."""
    return neighbours(gallery, gallery, k, np.arange(len(gallery)))
