"""Random convex mixtures of an image with chains of transforms of it (Hendrycks et al. 2020)."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from jaxtyping import Float32

Floats = Float32[np.ndarray, "h w 3"]  # grey levels, 0 to 255
Transform = Callable[[Floats, np.random.Generator], Floats]

WIDTH = 3  # chains
DEPTH = 3  # most transforms of a chain
MOST = 255.0


def mixed(image: Floats, transforms: Sequence[Transform], rng: np.random.Generator) -> Floats:
    """(1 - m) x + m sum_k w_k chain_k(x), m ~ Beta(1, 1), w ~ Dirichlet(1): algorithm 1 of AugMix.

    A chain has 1 to `DEPTH` transforms, drawn with replacement.

    Args:
      image: grey levels.
      transforms: to draw from.
    """
    share, weights = rng.beta(1, 1), rng.dirichlet([1.0] * WIDTH)
    out = image * np.float32(1 - share)
    for weight in weights:
        chain = image
        for which in rng.integers(len(transforms), size=rng.integers(1, DEPTH + 1)):
            chain = transforms[which](chain, rng)
        out += np.float32(share * weight) * chain
    return out


def warped(image: Floats, matrix: np.ndarray) -> Floats:
    """The image under an affine map of output to input positions (x, y); black outside."""
    height, width = image.shape[:2]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix.astype(np.float32), (width, height), flags=flags)


def clipped(image: Floats) -> Floats:
    """Grey levels clipped to 0 and 255."""
    return np.clip(image, 0, MOST)
