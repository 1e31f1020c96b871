"""Metric losses on unit descriptors of the global batch. A new loss is one function and one line of
`LOSSES`.

Symbols: x_i unit descriptor with label y_i, p_c unit proxy of class c, s_ij = x_i . x_j the cosine,
P(i) the other rows of the same class, N(i) the rows of other classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from afa.config import LossConfig
from afa.errors import choose

Rows = Float[Array, "n d"]
Labels = Int[Array, "n"]
ProxyRows = Float[Array, "c d"]
Loss = Callable[[Rows, Labels, ProxyRows, LossConfig], Float[Array, ""]]

_FAR = -1e9  # stands for "not a candidate" in a maximum


def _pairs(labels: Labels) -> tuple[Bool[Array, "n n"], Bool[Array, "n n"]]:
    same = labels[:, None] == labels[None, :]
    return same & ~jnp.eye(len(labels), dtype=bool), ~same


def _mean_over(values: Float[Array, "..."], chosen: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(chosen, values, 0)) / jnp.maximum(jnp.sum(chosen), 1)


def _cross_entropy(logits: Float[Array, "n c"], labels: Labels) -> Float[Array, ""]:
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)


def norm_softmax(x: Rows, y: Labels, proxies: ProxyRows, config: LossConfig) -> Float[Array, ""]:
    """Normalised softmax (Zhai & Wu 2019): mean_i -log softmax_c(x_i . p_c / T)[y_i]."""
    return _cross_entropy(x @ proxies.T / config.temperature, y)


def arcface(x: Rows, y: Labels, proxies: ProxyRows, config: LossConfig) -> Float[Array, ""]:
    """ArcFace (Deng et al. 2019, equation 3): the angle to the own proxy grows by the margin m.

    cos(a + m) = cos a cos m - sin a sin m; beyond a = pi - m it would turn back, and the slope is
    continued as in the authors' code. No arccos: its slope is infinite at 1.
    """
    cosine = x @ proxies.T
    sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosine), 0) + 1e-9)
    m = config.margin
    pushed = cosine * jnp.cos(m) - sine * jnp.sin(m)
    pushed = jnp.where(cosine > -jnp.cos(m), pushed, cosine - m * jnp.sin(m))
    own = jax.nn.one_hot(y, len(proxies), dtype=bool)
    return _cross_entropy(config.scale * jnp.where(own, pushed, cosine), y)


def proxy_anchor(x: Rows, y: Labels, proxies: ProxyRows, config: LossConfig) -> Float[Array, ""]:
    """Proxy-Anchor (Kim et al. 2020, equation 4), a = scale, d = margin:

    mean over proxies with positives of log(1 + sum_+ exp(-a(x.p - d)))
    + mean over all proxies of log(1 + sum_- exp(a(x.p + d))).
    """
    cosine, a, d = x @ proxies.T, config.scale, config.margin
    own = jax.nn.one_hot(y, len(proxies), dtype=bool)

    def log1p_sum(exponent: Float[Array, "n c"], chosen: Bool[Array, "n c"]) -> Float[Array, "c"]:
        terms = jnp.where(chosen, exponent, _FAR)
        return jax.nn.logsumexp(jnp.concatenate([jnp.zeros_like(terms[:1]), terms]), axis=0)

    pull = log1p_sum(-a * (cosine - d), own)
    push = log1p_sum(a * (cosine + d), ~own)
    return _mean_over(pull, own.any(0)) + push.mean()


def multi_similarity(
    x: Rows, y: Labels, proxies: ProxyRows, config: LossConfig
) -> Float[Array, ""]:
    """Multi-Similarity (Wang et al. 2019, equations 14 to 16), a = 2, b = 50, threshold 1/2:

    mean_i log(1 + sum_P exp(-a(s - t)))/a + log(1 + sum_N exp(b(s - t)))/b over mined pairs: a
    negative closer than the farthest positive plus the margin, and the other way round.
    """
    a, b, threshold = 2.0, 50.0, 0.5
    s = x @ x.T
    positive, negative = _pairs(y)
    farthest = jnp.min(jnp.where(positive, s, -_FAR), axis=1, keepdims=True)
    closest = jnp.max(jnp.where(negative, s, _FAR), axis=1, keepdims=True)
    positive &= s < closest + config.margin
    negative &= s > farthest - config.margin

    def soft(exponent: Float[Array, "n n"], chosen: Bool[Array, "n n"]) -> Float[Array, "n"]:
        terms = jnp.where(chosen, exponent, _FAR)
        return jax.nn.logsumexp(jnp.concatenate([jnp.zeros_like(terms[:, :1]), terms], 1), axis=1)

    pull, push = soft(-a * (s - threshold), positive), soft(b * (s - threshold), negative)
    return jnp.mean(pull / a + push / b)


def triplet(x: Rows, y: Labels, proxies: ProxyRows, config: LossConfig) -> Float[Array, ""]:
    """Triplet loss with the hardest positive and negative of the batch (Hermans et al. 2017,
    equation 5) on cosines: mean_i max(0, max_N s - min_P s + m)."""
    s = x @ x.T
    positive, negative = _pairs(y)
    hardest_positive = jnp.min(jnp.where(positive, s, -_FAR), axis=1)
    hardest_negative = jnp.max(jnp.where(negative, s, _FAR), axis=1)
    usable = positive.any(1) & negative.any(1)
    return _mean_over(jax.nn.relu(hardest_negative - hardest_positive + config.margin), usable)


def contrastive(x: Rows, y: Labels, proxies: ProxyRows, config: LossConfig) -> Float[Array, ""]:
    """Contrastive loss (Hadsell et al. 2006) on cosines: mean_P (1 - s) + mean_N max(0, s - m)
    over the negatives that violate the margin."""
    s = x @ x.T
    positive, negative = _pairs(y)
    excess = jax.nn.relu(s - config.margin)
    return _mean_over(1 - s, positive) + _mean_over(excess, negative & (excess > 0))


def supcon(x: Rows, y: Labels, proxies: ProxyRows, config: LossConfig) -> Float[Array, ""]:
    """Supervised contrastive loss (Khosla et al. 2020, equation 2):

    mean_i mean_{p in P(i)} -log( exp(s_ip/T) / sum_{j != i} exp(s_ij/T) ).
    """
    logits = jnp.where(jnp.eye(len(y), dtype=bool), _FAR, x @ x.T / config.temperature)
    log_share = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    positive, _ = _pairs(y)
    share = jnp.sum(jnp.where(positive, log_share, 0), 1) / jnp.maximum(positive.sum(1), 1)
    return _mean_over(-share, positive.any(1))


LOSSES: dict[str, Loss] = {
    "norm_softmax": norm_softmax,
    "arcface": arcface,
    "proxy_anchor": proxy_anchor,
    "multi_similarity": multi_similarity,
    "triplet": triplet,
    "contrastive": contrastive,
    "supcon": supcon,
}

# These compare images with images and leave the class head to itself.
WITHOUT_PROXIES = ("multi_similarity", "triplet", "contrastive", "supcon")


def metric_loss(
    blocks: dict[str, Rows], labels: Labels, proxies: dict[str, ProxyRows], config: LossConfig
) -> Float[Array, ""]:
    """The chosen loss over single-view and fused descriptors, weighted.

    A loss that uses no proxies still trains the class head, by norm_softmax on descriptors that
    pass no gradient on: the posterior is part of the method.

    Raises:
      UserError: no such loss.
    """
    loss = choose("loss.name", config.name, LOSSES)
    weights = {"global": 1.0, "local": config.local_weight, "fused": config.fused_weight}
    total = jnp.zeros(())
    for name, weight in weights.items():
        if weight > 0:
            total += weight * loss(blocks[name], labels, proxies[name], config)
        if config.name in WITHOUT_PROXIES:
            fixed = jax.lax.stop_gradient(blocks[name])
            total += norm_softmax(fixed, labels, proxies[name], config)
    return total / sum(weights.values())
