"""The backbones there are, what they weigh, and which of them a file of weights belongs to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from afa.config import BackboneConfig
from afa.errors import UserError
from afa.models import backbones, pretrained
from afa.models.pretrained import files, match, parts
from afa.models.pretrained.match import Account
from afa.models.pretrained.skeleton import Variables, logits_of, skeleton


def without_shapes(variables: Variables) -> Variables:
    """Zeros where nothing was filled in: the adversarial branch's own parameters."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
        variables,
    )


@dataclass(frozen=True)
class Weight:
    """What a backbone costs at its published size: parameters with its classifier, as its makers
    count them, and floating-point operations of one image, as XLA counts them."""

    parameters: int
    operations: float


def weigh(name: str) -> Weight:
    """Counts a backbone; nothing is computed or compiled."""
    module, variables = skeleton(name)
    side = backbones.member(name).input_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    forward = jax.jit(lambda v, x: module.apply(v, x, method=logits_of))
    analysis = forward.lower(variables, image).cost_analysis() or {}
    count = sum(
        int(np.prod(value.shape))
        for collection, _, value in match.leaves(variables)
        if collection == "params"
    )
    return Weight(count, float(analysis.get("flops", 0.0)))


@dataclass(frozen=True)
class Verdict:
    """A file of weights, and the backbone it belongs to.

    Attributes:
      name: of the backbone.
      weights: as read for it.
      account: what became of every parameter.
      variables: the filled backbone.
    """

    name: str
    weights: pretrained.Pretrained
    account: Account
    module: Any
    variables: Variables


def identify(
    source: str,
    candidates: Iterable[str] | None = None,
    note: Callable[[str], None] = lambda name: None,
    part: str = "",
) -> Verdict:
    """The backbone that fits a file of weights best: with the fewest parameters out of place.

    Args:
      source: as `backbone.weights`.
      candidates: names to try; None: all.
      note: told each name that is tried.
      part: as `backbone.part`.

    Raises:
      UserError: the file cannot be read, or has no parameter of any candidate.
    """
    file = files.read(source)
    best: tuple[int, Verdict] | None = None
    for name in backbones.MEMBERS if candidates is None else candidates:
        member = backbones.member(name)
        note(name)
        weights = pretrained.understood(file, name, part)
        module, shapes = skeleton(name)
        variables, account = match.fill(shapes, weights.arrays, member.aside)
        misfit = len(account.missing) + len(account.unmatched) + len(account.reshaped)
        if account.loaded and (best is None or misfit < best[0]):
            best = misfit, Verdict(name, weights, account, module, variables)
    if best is None:
        there = ", ".join(parts.listed(file.arrays)[: parts.SHOWN]) or "none"
        raise UserError(
            f"{source}: has no parameter of any backbone; parts of it with several tensors: {there}"
        )
    return best[1]


def classify(verdict: Verdict, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b n"]:
    """Scores of the published classifier for images that are already cut to size.

    Raises:
      UserError: the file does not fill the whole network.
    """
    config = BackboneConfig(verdict.name, head="imagenet")
    pretrained.fill(skeleton(verdict.name)[1], verdict.weights, config)
    expected = verdict.weights.preprocessing
    x = images.astype(np.float32) / 255
    x = x if expected.channels == "rgb" else x[..., ::-1]
    x = (x - np.asarray(expected.mean, np.float32)) / np.asarray(expected.std, np.float32)
    rows = [
        np.asarray(
            verdict.module.apply(verdict.variables, jnp.asarray(each[None]), method=logits_of)
        )
        for each in x
    ]
    return np.concatenate(rows)
