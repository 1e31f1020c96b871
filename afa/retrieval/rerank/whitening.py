"""Whitening of descriptors, fitted on training classes.

PCA whitening (Jégou and Chum 2012) needs no labels. Learned whitening (Mikolajczyk and Matas 2007;
Radenović et al. 2019, section 3.3) whitens the within-class covariance, then projects on the
principal components of the result.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int

from afa.errors import UserError
from afa.retrieval.exact import check_unit, normalise


@dataclass(frozen=True)
class Whitening:
    """An affine projection followed by normalisation to unit length.

    Attributes:
      mean: subtracted from vectors.
      matrix: projection; columns are ordered by decreasing variance.
    """

    mean: Float32[np.ndarray, "d"]
    matrix: Float32[np.ndarray, "d e"]

    def __call__(self, vectors: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n e"]:
        return normalise((vectors - self.mean) @ self.matrix)


def pca_whitening(
    vectors: Float32[np.ndarray, "n d"], dimension: int, shrinkage: float
) -> Whitening:
    """Fits PCA whitening.

    Args:
      vectors: unit vectors to fit on.
      dimension: number of components that are kept.
      shrinkage: weight of the mean variance in the variance of every component, so that components
        of low variance (noise) are not amplified.

    Raises:
      UserError: vectors that are not finite or not of unit length, or a dimension or shrinkage out
        of range.
    """
    wide = _checked(vectors, dimension, shrinkage)
    mean = wide.mean(axis=0)
    variance, directions = _spectrum(_covariance(wide - mean))
    scale = 1 / np.sqrt(_shrunk(variance, shrinkage))
    matrix = (directions * scale)[:, :dimension]
    return Whitening(mean.astype(np.float32), matrix.astype(np.float32))


def learned_whitening(
    vectors: Float32[np.ndarray, "n d"],
    labels: Int[np.ndarray, "_"],
    dimension: int,
    shrinkage: float,
) -> Whitening:
    """Fits learned whitening.

    Args:
      vectors, dimension, shrinkage: as in `pca_whitening`.
      labels: class of each vector.

    Raises:
      UserError: as `pca_whitening`; no class with two vectors, or labels of another length.
    """
    wide = _checked(vectors, dimension, shrinkage)
    if len(labels) != len(vectors):
        raise UserError(f"labels has {len(labels)} entries for {len(vectors)} vectors")
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.max() < 2:
        raise UserError("learned whitening needs a class with at least 2 images")
    sums = np.zeros((len(counts), wide.shape[1]))
    np.add.at(sums, group, wide)
    within = wide - (sums / counts[:, None])[group]
    variance, directions = _spectrum(_covariance(within))
    whiten = directions / np.sqrt(_shrunk(variance, shrinkage))
    mean = wide.mean(axis=0)
    _, components = _spectrum(_covariance((wide - mean) @ whiten))
    matrix = (whiten @ components)[:, :dimension]
    return Whitening(mean.astype(np.float32), matrix.astype(np.float32))


def _checked(
    vectors: Float32[np.ndarray, "n d"], dimension: int, shrinkage: float
) -> Float64[np.ndarray, "n d"]:
    check_unit("vectors", vectors)
    if not 1 <= dimension <= vectors.shape[1]:
        raise UserError(f"dimension={dimension} is not between 1 and {vectors.shape[1]}")
    if not 0 < shrinkage <= 1:
        raise UserError(f"shrinkage={shrinkage} must lie in (0, 1]")
    return vectors.astype(np.float64)


def _covariance(centred: Float64[np.ndarray, "n d"]) -> Float64[np.ndarray, "d d"]:
    return centred.T @ centred / len(centred)


def _spectrum(
    covariance: Float64[np.ndarray, "d d"],
) -> tuple[Float64[np.ndarray, "d"], Float64[np.ndarray, "d d"]]:
    """Variances, largest first, and the principal directions as columns."""
    variance, directions = np.linalg.eigh(covariance)
    return np.maximum(variance[::-1], 0), directions[:, ::-1]


def _shrunk(variance: Float64[np.ndarray, "d"], shrinkage: float) -> Float64[np.ndarray, "d"]:
    return (1 - shrinkage) * variance + shrinkage * variance.mean()
