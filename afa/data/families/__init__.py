"""Families of random image transforms that make training pictures harder, without an adversary.

They are the rivals of adversarial training: each is one file, with its published settings, and one
line of `FAMILIES`. None contains a corruption that is held back.

A family is a pure function of (image, random generator).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from afa.data.families import augmix, fills, noise, overlays, prime, random_convolution

Pixels = UInt8[np.ndarray, "h w 3"]
Family = Callable[[Pixels, np.random.Generator], Pixels]

FAMILIES: dict[str, Family] = {
    "augmix": augmix.augmix,
    "prime": prime.prime,
    "random_convolution": random_convolution.random_convolution,
    "noise": noise.noise,
    "overlays": overlays.overlays,
    "fills": fills.fills,
}
LOCAL = (
    "overlays",
    "fills",
)  # those that hide part of the image and leave the other pixels as they are
