"""The content of a published file of weights, of the lightest backbone."""

import numpy as np
import rule

from afa.models.pretrained import match

NAME = "squeezenet1_1"


def arrays(shapes) -> dict[str, np.ndarray]:
    """Name -> array, as PyTorch would store them."""
    return {
        match.published(path): rule.value(
            match.published(path), match.to_published(np.empty(leaf.shape, np.float32), path).shape
        )
        for _, path, leaf in match.leaves(shapes)
    }
