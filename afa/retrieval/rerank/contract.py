"""What a re-ranker is, and the neighbours that all of them start from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Float32, Int, Int64

from afa.models.heads import LocalFeatures
from afa.retrieval import exact

# queries (unit vectors), exclude (row of each query that is the query itself, -1: none) -> score of
# every gallery row, higher is better. The row that is excluded may get any score.
Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]

# gallery (unit vectors), parameters -> what answers over it.
Reranker = Callable[..., Scorer]


@dataclass(frozen=True)
class ImageFeatures:
    """What is known of some images beside their descriptors; a method takes what it needs.

    Attributes:
      vectors: unit descriptors.
      posterior: probabilities of the training classes; no columns when nobody asks for them.
      places: scale of the images -> the strongest places of their local view.
      multi_scale: (scales, power) -> unit descriptors of several scales combined.
    """

    vectors: Float32[np.ndarray, "n d"]
    posterior: Float32[np.ndarray, "n classes"]
    local_features: Mapping[float, LocalFeatures] = field(default_factory=dict)
    multi_scale: Mapping[tuple[tuple[float, ...], float], np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, vectors: Float32[np.ndarray, "n d"]) -> "ImageFeatures":
        """Images of which there are descriptors alone."""
        return cls(vectors, np.zeros((len(vectors), 0), np.float32))

    def rows(self, index: Int[np.ndarray, "m"] | slice) -> "ImageFeatures":
        """The images at `index`."""
        parts = (self.vectors, self.posterior, dict(self.local_features), dict(self.multi_scale))
        return ImageFeatures(*jax.tree.map(lambda part: part[index], parts))


# As Scorer and Reranker, for methods that need more of an image than its descriptor.
ImageScorer = Callable[[ImageFeatures, np.ndarray], np.ndarray]
ImageReranker = Callable[..., ImageScorer]


def of_vectors(reranker: Reranker) -> ImageReranker:
    """A method of descriptors as one of images."""

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
    """Similarities and rows of the k nearest, or of all there are when they are fewer."""
    available = len(gallery) - (exclude is not None and bool(np.any(exclude >= 0)))
    return exact.topk(queries, gallery, min(k, available), exclude)


def own_neighbours(
    gallery: Float32[np.ndarray, "n d"], k: int
) -> tuple[Float32[np.ndarray, "n j"], Int64[np.ndarray, "n j"]]:
    """The same of every gallery row among the others."""
    return neighbours(gallery, gallery, k, np.arange(len(gallery)))
