"""Losses: one file per metric loss, registered in `LOSSES`; `adversarial` has those of G and D.

A metric loss is a frozen dataclass whose defaults are the published settings; see `base`.

>>> import afa
>>> sorted(afa.losses.LOSSES)[:3]
['arcface', 'contrastive', 'multi_similarity']
>>> loss = afa.losses.LOSSES["arcface"](margin=0.3)
>>> loss.scale, loss.margin
(64.0, 0.3)
"""

from afa.errors import choose
from afa.losses import (
    arcface,
    contrastive,
    multi_similarity,
    norm_softmax,
    proxy_anchor,
    supcon,
    triplet,
)
from afa.losses.base import Loss

LOSSES: dict[str, type[Loss]] = {
    each.name: each
    for each in (
        norm_softmax.NormSoftmax,
        arcface.ArcFace,
        proxy_anchor.ProxyAnchor,
        multi_similarity.MultiSimilarity,
        triplet.Triplet,
        contrastive.Contrastive,
        supcon.SupCon,
    )
}


def named(name: str, like: Loss) -> Loss:
    """Returns the named loss with its published settings, or `like` if it has that name.

    Args:
      like: source of the weights of the descriptor blocks, which all losses share.

    Raises:
      UserError: unknown loss.
    """
    chosen = choose("loss.name", name, LOSSES)
    if name == like.name:
        return like
    return chosen(local_weight=like.local_weight, fused_weight=like.fused_weight)
