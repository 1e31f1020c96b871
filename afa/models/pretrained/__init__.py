"""Weights in: somebody's file -> the variables of a backbone; and out again."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxtyping import PyTree

from afa.config import RANDOM, BackboneConfig
from afa.errors import UserError
from afa.models import backbones
from afa.models.backbones.contract import Preprocessing
from afa.models.pretrained import about, files, match, parts
from afa.models.pretrained.files import File
from afa.models.pretrained.match import Account
from afa.models.pretrained.names import Arrays
from afa.models.pretrained.skeleton import published_names


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights that were read, by our names, and what is known of them.

    Attributes:
      arrays: published name, as ours -> values in PyTorch's order of axes.
      source, sha256: where they come from, and the digest of those bytes.
      names: the library whose names the file has.
      preprocessing: what they expect of an image.
      part: prefix of the names that were taken, "" of a whole file.
      outside: names of the file that do not begin so.
      told: lines on what was found and changed, for the user.
    """

    arrays: Arrays
    source: str
    sha256: str
    names: str
    preprocessing: Preprocessing
    part: str = ""
    outside: tuple[str, ...] = ()
    told: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """What is stored with a run and its index."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "names": self.names,
            "part": self.part,
            "preprocessing": dataclasses.asdict(self.preprocessing),
        }


def read(config: BackboneConfig) -> Pretrained | None:
    """Reads `config.weights` for the network `config.name`; None if they are to be random.

    Raises:
      UserError: as `files.read`, or no such network; where the weights are not on this machine, it
        says what to get and how to do without.
    """
    member = backbones.member(config.name)  # a misspelt name should not wait for the file
    if config.weights == RANDOM:
        return None
    if not config.weights:
        raise UserError(f"backbone.weights='' names nothing (from scratch: {RANDOM})")
    try:
        return understood(files.read(config.weights), config.name, config.part)
    except files.Missing as error:
        raise UserError(
            f"{error}: get the weights of {config.name}, published as {member.source}, and name "
            f"them with --backbone.weights=FILE, or train from scratch on purpose with "
            f"--backbone.weights={RANDOM}"
        ) from None


def understood(file: File, name: str, part: str = "") -> Pretrained:
    """What a file holds for the network `name`, by our names.

    Args:
      part: prefix of the names to look among (`backbone.part`).

    Raises:
      UserError: no such part, or what lies beside the file is no preprocessing.
    """
    found = parts.find(file.arrays, backbones.family(name), published_names(name), part)
    expected, told = about.preprocessing(
        file.about, backbones.member(name).preprocessing, file.source
    )
    if found.prefix:
        others = ", ".join(each.rstrip(".") for each in found.others)
        also = f"; {others} would fit too (backbone.part chooses)" if others else ""
        told = (f"part {found.prefix.rstrip('.')} of the file{also}", *told)
    return Pretrained(
        found.arrays, file.source, file.sha256, found.library, expected, found.prefix,
        found.outside, told,
    )  # fmt: skip


def fill(
    variables: Mapping[str, PyTree], pretrained: Pretrained, config: BackboneConfig
) -> tuple[dict[str, PyTree], Account]:
    """The variables of the backbone, with the weights in them.

    Args:
      variables: {"params", "batch_stats"} of the backbone alone.

    Raises:
      UserError: the weights do not fit, and `config.allow_partial` does not let them; every
        parameter that is missing, unmatched or of another shape is named. Or values that no
        network can work with, such as NaN.
    """
    member = backbones.member(config.name)
    # A run may do without the published classifier; nothing else may be left over.
    aside = member.aside if config.head == "imagenet" else f"{member.aside}|{CLASSIFIER}"
    filled, account = match.fill(variables, pretrained.arrays, aside)
    field = f"backbone.weights={pretrained.source!r} as {config.name}"
    account.refuse(config.allow_partial, field)
    return filled, account


def of_classifier(name: str) -> bool:
    """Whether a published name is that of a parameter of the classifier."""
    return re.fullmatch(CLASSIFIER, name) is not None


CLASSIFIER = r"(fc|classifier|last_linear|head|head_dist)(\.\d)?\.(weight|bias)"
