"""Routing: which view of a query F describes - the query itself, a filtered view, or G(x).

The gallery holds descriptors of its images as they are: a gallery image has one vector, and a view
that helps only poor queries changes nothing there. A judge scores the views of each query. To add
a judge, write a function and add it to `JUDGES`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from afa.models import views as filters

ORIGINAL = "original"  # the query as it is
RESTORED = "restored"  # G of the query
Images = Float[Array, "b h w 3"]
Scores = Float[Array, "b"]

NOISE_GAIN = 10.0  # brings the measures of `hand_made` to the size of logits


class Views(NamedTuple):
    """Views of a batch of queries, and what judges may ask of them.

    Attributes:
      images: view -> images in [0, 1]; has the original.
      logits: images -> D's logits that they are real.
      posteriors: () -> view -> class posteriors of F, summing to 1.
      damage: images -> D's estimate for every pixel that it is damaged.
    """

    images: Mapping[str, Images]
    logits: Callable[[Images], Scores]
    posteriors: Callable[[], Mapping[str, Float[Array, "b c"]]]
    damage: Callable[[Images], Float[Array, "b h w"]]


Judge = Callable[[Views], dict[str, Scores]]


def discriminator(views: Views) -> dict[str, Scores]:
    """D's logit that the view is real."""
    logits = views.logits(jnp.concatenate(list(views.images.values())))
    return dict(zip(views.images, jnp.split(logits, len(views.images)), strict=True))


def damage(views: Views) -> dict[str, Scores]:
    """D's estimate of the damaged share of the query speaks for G, and against the others."""
    share = jnp.mean(views.damage(views.images[ORIGINAL]), axis=(1, 2))
    return {name: share if name == RESTORED else jnp.zeros_like(share) for name in views.images}


def confidence(views: Views) -> dict[str, Scores]:
    """Rival of D: the largest class posterior of F, which has to describe every view."""
    return {name: jnp.max(each, axis=-1) for name, each in views.posteriors().items()}


def hand_made(views: Views) -> dict[str, Scores]:
    """Rival of D without learning: how much impulses stand out of the query speaks for the median
    filter, and the noise level of the query for G.

    Impulses: the mean of |x - median(x)| beyond 0.2. Noise: the estimate of its deviation from a
    mask of second differences, sqrt(pi / 2) mean |N * x| / 6 (Immerkær 1996, equation 5).
    """
    x = views.images[ORIGINAL]
    impulses = jnp.mean(jnp.maximum(jnp.abs(x - filters.median(x)) - 0.2, 0), (1, 2, 3))
    grey = x.mean(-1)
    rows = grey[:, 2:] - 2 * grey[:, 1:-1] + grey[:, :-2]
    laplacian = rows[:, :, 2:] - 2 * rows[:, :, 1:-1] + rows[:, :, :-2]
    noise = math.sqrt(math.pi / 2) / 6 * jnp.mean(jnp.abs(laplacian), (1, 2))
    measures = {"median": 10 * NOISE_GAIN * impulses, RESTORED: NOISE_GAIN * noise}
    return {name: measures.get(name, jnp.zeros_like(noise)) for name in views.images}


def random(views: Views) -> dict[str, Scores]:
    """Control: scores drawn from the pixels of the query alone."""
    totals = jnp.sum(jnp.round(255 * views.images[ORIGINAL]), (1, 2, 3)).astype(jnp.uint32)
    keys = jax.vmap(lambda total: jax.random.fold_in(jax.random.key(0), total))(totals)
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (len(views.images),)))(keys)
    return {name: drawn[:, i] for i, name in enumerate(views.images)}


JUDGES: dict[str, Judge] = {
    "discriminator": discriminator,
    "damage": damage,
    "confidence": confidence,
    "hand_made": hand_made,
    "random": random,
}


def chosen(
    scores: Mapping[str, Scores], offsets: Sequence[tuple[str, float | Float[Array, ""]]]
) -> Int[Array, "b"]:
    """Index, among the views of the offsets, of the largest score + offset; the first of equals."""
    totals = [scores[view] + offset for view, offset in offsets]
    best, index = totals[0], jnp.zeros_like(totals[0], jnp.int32)
    for number, total in enumerate(totals[1:], start=1):
        index = jnp.where(total > best, number, index)
        best = jnp.maximum(best, total)
    return index


def pick(index: Int[Array, "b"], candidates: Sequence[Float[Array, "b *shape"]]) -> Array:
    """Row i of the candidate `index[i]`."""
    picked = candidates[0]
    for number, candidate in enumerate(candidates[1:], start=1):
        mask = jnp.expand_dims(index == number, tuple(range(1, candidate.ndim)))
        picked = jnp.where(mask, candidate, picked)
    return picked
