"""Image sets of known labels, for protocols and metrics."""

import numpy as np

from afa.data.types import ImageSet

DIMENSION = 64


def image_set(classes, count, catalogue=True, first=0, side=8, seed=0):
    """Grey images: `count` in the wild a class, and one for the catalogue, in mixed order."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(first, first + classes), count + catalogue)
    clean = np.tile(np.arange(count + catalogue) == count, classes)
    order = rng.permutation(len(labels))
    images = [np.full((side, side, 3), 10 * i % 256, np.uint8) for i in order]
    labels, clean = labels[order], clean[order] & catalogue
    return ImageSet(images, labels, tuple(f"image {first}/{i}" for i in order), clean)
