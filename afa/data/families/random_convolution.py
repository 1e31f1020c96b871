"""Random convolutions: random textures on unchanged shapes."""

import cv2
import numpy as np
from jaxtyping import UInt8

SIDES = (1, 3, 5, 7)  # published multi-scale kernels


def random_convolution(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """(1 - a) x + a (K * x), a ~ U(0, 1), with a random kernel K from three to three channels and
    entries N(0, 1 / (3 k^2)) (Xu et al. 2021, sections 3.1 and 3.2). Images are centred: the paper
    applies K to normalised images. The mean of the image is added again."""
    side = int(rng.choice(SIDES))
    kernels = rng.normal(0, 1 / np.sqrt(3 * side**2), (3, 3, side, side)).astype(np.float32)
    mean = image.mean((0, 1), dtype=np.float32)
    centred = image.astype(np.float32) - mean
    out = np.stack([
        sum(cv2.filter2D(centred[..., i], -1, kernels[o, i], borderType=cv2.BORDER_REFLECT_101)
            for i in range(3))
        for o in range(3)
    ], axis=-1)  # fmt: skip
    share = np.float32(rng.random())
    return np.clip(np.rint(mean + (1 - share) * centred + share * out), 0, 255).astype(np.uint8)
