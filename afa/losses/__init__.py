"""Losses: one file per metric loss, registered in `LOSSES`; `adversarial` has those of G and D.

A metric loss is a frozen dataclass whose defaults are the published settings; see `base`.

>>> import afa
>>> sorted(afa.losses.LOSSES)[:3]
['arcface', 'circle', 'contrastive']
>>> loss = afa.losses.LOSSES["arcface"](margin=0.3)
>>> loss.scale, loss.margin
(64.0, 0.3)
"""

from afa.errors import choose
from afa.losses.arcface import ArcFace
from afa.losses.base import Loss
from afa.losses.circle import Circle
from afa.losses.contrastive import Contrastive
from afa.losses.cosface import CosFace
from afa.losses.cross_batch_memory import CrossBatchMemory
from afa.losses.lifted_structure import LiftedStructure
from afa.losses.memvir import MemVir
from afa.losses.multi_similarity import MultiSimilarity
from afa.losses.norm_softmax import NormSoftmax
from afa.losses.nt_xent import NTXent
from afa.losses.proxy_anchor import ProxyAnchor
from afa.losses.proxy_nca import ProxyNCA
from afa.losses.proxy_synthesis import ProxySynthesis
from afa.losses.smooth_ap import SmoothAP
from afa.losses.soft_triple import SoftTriple
from afa.losses.supcon import SupCon
from afa.losses.triplet import Triplet

LOSSES: dict[str, type[Loss]] = {
    each.name: each
    for each in (
        NormSoftmax,
        ProxyNCA,
        ArcFace,
        CosFace,
        SoftTriple,
        ProxyAnchor,
        ProxySynthesis,
        MemVir,
        Contrastive,
        CrossBatchMemory,
        Triplet,
        LiftedStructure,
        MultiSimilarity,
        Circle,
        NTXent,
        SupCon,
        SmoothAP,
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
