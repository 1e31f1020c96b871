"""Costs of the backbones, and identification of the backbone of a file of weights."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from afa import parallel
from afa.config import BackboneConfig
from afa.errors import UserError
from afa.models import backbones, pretrained
from afa.models.pretrained import files, match, parts
from afa.models.pretrained.match import LoadReport
from afa.models.pretrained.skeleton import Variables, logits_of, skeleton


def without_shapes(variables: Variables) -> Variables:
    """Replaces shapes without values by zeros: the parameters of the adversarial branch."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
        variables,
    )


@dataclass(frozen=True)
class Weight:
    """Cost of a backbone at its published image size.

    Attributes:
      parameters: number of parameters, including the published classifier.
      operations: floating-point operations per image, as counted by XLA.
    """

    parameters: int
    operations: float


def weigh(name: str) -> Weight:
    """Counts parameters and operations of a backbone, without computing or compiling it."""
    module, variables = skeleton(name)
    side = backbones.member(name).input_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    operations = parallel.flops(lambda v, x: module.apply(v, x, method=logits_of), variables, image)
    count = sum(
        int(np.prod(value.shape))
        for collection, _, value in match.leaves(variables)
        if collection == "params"
    )
    return Weight(count, operations)


@dataclass(frozen=True)
class Identification:
    """A file of weights, and the backbone that fits it best.

    Attributes:
      name: name of the backbone.
      weights: the weights, with our parameter names.
      report: result of loading.
      module: the backbone.
      variables: variables of the backbone, with the weights.
    """

    name: str
    weights: pretrained.Pretrained
    report: LoadReport
    module: Any
    variables: Variables


def identify(
    source: str,
    candidates: Iterable[str] | None = None,
    note: Callable[[str], None] = lambda name: None,
    part: str = "",
) -> Identification:
    """Finds the backbone that fits a file of weights best, with the fewest mismatched keys.

    Args:
      source: as `backbone.weights`.
      candidates: names of backbones to try; None for all.
      note: called with each name before it is tried.
      part: as `backbone.part`.

    Raises:
      UserError: the file cannot be read, or has no parameter of any candidate.
    """
    file = files.read(source)
    best: tuple[int, Identification] | None = None
    for name in backbones.MEMBERS if candidates is None else candidates:
        member = backbones.member(name)
        note(name)
        weights = pretrained.from_file(file, name, part)
        module, shapes = skeleton(name)
        variables, report = match.load_weights(shapes, weights.arrays, member.ignored)
        misfits = len(report.missing) + len(report.unexpected) + len(report.mismatched)
        if report.loaded and (best is None or misfits < best[0]):
            best = misfits, Identification(name, weights, report, module, variables)
    if best is None:
        known = ", ".join(parts.listed(file.arrays)[: parts.SHOWN]) or "none"
        raise UserError(
            f"{source}: has no parameter of any backbone; parts with several tensors: {known}"
        )
    return best[1]


def classify(
    found: Identification, images: UInt8[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, "b n"]:
    """Computes the logits of the published classifier for images that are already cropped.

    Raises:
      UserError: the file does not have all weights of the network.
    """
    config = BackboneConfig(found.name, head="imagenet")
    pretrained.load_weights(skeleton(found.name)[1], found.weights, config)
    expected = found.weights.preprocessing
    x = images.astype(np.float32) / 255
    x = x if expected.channels == "rgb" else x[..., ::-1]
    x = (x - np.asarray(expected.mean, np.float32)) / np.asarray(expected.std, np.float32)
    rows = [
        np.asarray(found.module.apply(found.variables, jnp.asarray(each[None]), method=logits_of))
        for each in x
    ]
    return np.concatenate(rows)
