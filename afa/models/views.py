"""Second views of an image: functions from images to images. Their descriptors are fused, or one of
them describes a query in its place (`afa.models.routing`).

The restored view G(x) needs the generator and is computed in `afa.models.networks`. To add a view,
write a function and add it to `VIEWS`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from afa.data.augment import LUMA

Images = Float[Array, "b h w 3"]

TILES = 4  # of `clahe`, along each side
BINS = 32  # of its histograms
CLIP = 2.0  # largest bin, relative to the mean


def flip(images: Images) -> Images:
    """Flips horizontally."""
    return images[:, :, ::-1]


def median(images: Images) -> Images:
    """3x3 median filter per channel, with edge padding, by compare-exchange (XLA sorts slowly).

    Sort each column of three. The median of nine is the median of: the maximum of the column
    minima, the median of the column medians, and the minimum of the column maxima (Smith 1996).
    """
    rows = jnp.pad(images, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge")
    low, middle, high = _order(rows[:, :-2], rows[:, 1:-1], rows[:, 2:])

    def neighbours(x: Images) -> tuple[Images, Images, Images]:
        wide = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="edge")
        return wide[:, :, :-2], wide[:, :, 1:-1], wide[:, :, 2:]

    largest_low = _order(*neighbours(low))[2]
    middle_middle = _order(*neighbours(middle))[1]
    smallest_high = _order(*neighbours(high))[0]
    return _order(largest_low, middle_middle, smallest_high)[1]


def _order(a: Images, b: Images, c: Images) -> tuple[Images, Images, Images]:
    a, b = jnp.minimum(a, b), jnp.maximum(a, b)
    b, c = jnp.minimum(b, c), jnp.maximum(b, c)
    return jnp.minimum(a, b), jnp.maximum(a, b), c


def standardise(images: Images) -> Images:
    """Standardises each channel to mean 1/2 and standard deviation 1/4, clipped to [0, 1]."""
    return jnp.clip(_standardised(images, (1, 2)), 0, 1)


def clahe(images: Images) -> Images:
    """Contrast-limited adaptive histogram equalisation of the luminance (Zuiderveld 1994), in four
    by four tiles; bins above twice the mean are clipped and their excess is spread evenly."""
    height, width = images.shape[1:3]
    grey = images @ jnp.asarray(LUMA, images.dtype)
    scaled = grey * BINS
    bins = jnp.minimum(jnp.floor(scaled), BINS - 1)
    rows, columns = _tiles(height), _tiles(width)
    counted = [jnp.einsum("tr,brc,uc->btu", rows, (bins == each).astype(grey.dtype), columns)
               for each in range(BINS)]  # fmt: skip
    shares = jnp.concatenate([each[..., None] for each in counted], axis=-1)
    excess = jnp.maximum(shares - CLIP / BINS, 0).sum(-1, keepdims=True)
    shares = jnp.minimum(shares, CLIP / BINS) + excess / BINS
    # The distribution function, linear inside a bin, of every tile; between the centres of the
    # tiles, interpolated.
    down, across = (_between_tiles(side) for side in (height, width))
    equalised = jnp.zeros_like(grey)
    for each in range(BINS):
        local = jnp.einsum("rt,btu,cu->brc", down, shares[..., each], across)
        equalised += local * jnp.clip(scaled - each, 0, 1)
    return jnp.clip(images + (equalised - grey)[..., None], 0, 1)


def _tiles(side: int) -> Float[Array, "t n"]:
    """Matrix that averages the pixels of each tile."""
    owner = jnp.arange(side) * TILES // side
    members = (owner == jnp.arange(TILES)[:, None]).astype(jnp.float32)
    return members / members.sum(1, keepdims=True)


def _between_tiles(side: int) -> Float[Array, "n t"]:
    """Matrix that interpolates from the centres of the tiles to the pixels."""
    return jax.image.resize(jnp.eye(TILES), (side, TILES), "linear")


def zoom(images: Images) -> Images:
    """The centre of the image, of sqrt(1/2) of the side, enlarged to its size: a second scale."""
    height, width = images.shape[1:3]
    top, left = (round(side * (1 - 0.5**0.5) / 2) for side in (height, width))
    centre = images[:, top : height - top, left : width - left]
    return jnp.clip(jax.image.resize(centre, images.shape, "cubic"), 0, 1)


def level(images: Images) -> Images:
    """Standardises each image to mean 1/2 and standard deviation 1/4 over all pixels and channels.

    Removes differences of brightness and contrast, and keeps colours. Not clipped.
    """
    return _standardised(images, (1, 2, 3))


def _standardised(images: Images, axes: tuple[int, ...]) -> Images:
    """Scales to mean 1/2 and standard deviation 1/4 over the axes; constant images stay so."""
    mean, spread = moments(images, axes)
    return 0.5 + 0.25 * (images - mean) / spread


def moments(
    images: Images, axes: tuple[int, ...]
) -> tuple[Float[Array, "b _ _ _"], Float[Array, "b _ _ _"]]:
    """Mean and standard deviation over the axes, which are kept; at least 0.01, for constant
    images."""
    mean = images.mean(axes, keepdims=True)
    return mean, jnp.sqrt(jnp.square(images - mean).mean(axes, keepdims=True) + 1e-4)


VIEWS: dict[str, Callable[[Images], Images]] = {
    "flip": flip,
    "median": median,
    "standardise": standardise,
    "clahe": clahe,
    "zoom": zoom,
}
FILTERS = ("median", "standardise", "clahe", "zoom")  # those that can improve a query
