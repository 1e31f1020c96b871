"""Loads pretrained weights from a file into the variables of a backbone, and exports them."""

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
from afa.models.pretrained.match import LoadReport
from afa.models.pretrained.names import Arrays
from afa.models.pretrained.skeleton import published_names


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights read from a file, with our parameter names.

    Attributes:
      arrays: parameter name -> values with PyTorch's axis order.
      source, sha256: where the weights are from, and the digest of the file.
      names: library whose parameter names the file has.
      preprocessing: preprocessing that the weights need.
      part: prefix of the keys that were used, "" for the whole file.
      outside: keys of the file without this prefix.
      notes: lines for the user on what was found and changed.
    """

    arrays: Arrays
    source: str
    sha256: str
    names: str
    preprocessing: Preprocessing
    part: str = ""
    outside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Returns the information that is stored with a run and its index."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "names": self.names,
            "part": self.part,
            "preprocessing": dataclasses.asdict(self.preprocessing),
        }


def read(config: BackboneConfig) -> Pretrained | None:
    """Reads `config.weights` for the backbone `config.name`; None for random initialisation.

    Raises:
      UserError: as `files.read`, or unknown backbone. For missing weights, the message says what to
        download, and how to train from scratch.
    """
    member = backbones.member(config.name)  # check the name before reading a large file
    if config.weights == RANDOM:
        return None
    if not config.weights:
        raise UserError(f"backbone.weights='' is empty (to train from scratch: {RANDOM})")
    try:
        return from_file(files.read(config.weights), config.name, config.part)
    except files.Missing as error:
        raise UserError(
            f"{error}: get the weights of {config.name}, published as {member.source}, and pass "
            f"them as --backbone.weights=FILE, or train from scratch with "
            f"--backbone.weights={RANDOM}"
        ) from None


def from_file(file: File, name: str, part: str = "") -> Pretrained:
    """Extracts the weights of the backbone `name` from a file, with our parameter names.

    Args:
      part: prefix of the keys to search (`backbone.part`).

    Raises:
      UserError: no such part, or an invalid preprocessing configuration next to the file.
    """
    found = parts.find(file.arrays, backbones.family(name), published_names(name), part)
    expected, notes = about.preprocessing(
        file.about, backbones.member(name).preprocessing, file.source
    )
    if found.prefix:
        others = ", ".join(each.rstrip(".") for each in found.others)
        also = f"; {others} fit too (set backbone.part to choose)" if others else ""
        notes = (f"part {found.prefix.rstrip('.')} of the file{also}", *notes)
    return Pretrained(
        found.arrays, file.source, file.sha256, found.library, expected, found.prefix,
        found.outside, notes,
    )  # fmt: skip


def load_weights(
    variables: Mapping[str, PyTree], pretrained: Pretrained, config: BackboneConfig
) -> tuple[dict[str, PyTree], LoadReport]:
    """Loads weights into the variables of a backbone.

    Args:
      variables: {"params", "batch_stats"} of the backbone alone.

    Returns:
      The variables with the weights, and a report on every key.

    Raises:
      UserError: missing keys, unexpected keys or shape mismatches that `config.allow_partial` does
        not allow, or invalid values such as NaN.
    """
    member = backbones.member(config.name)
    # Only the published classifier may remain unused.
    ignored = member.ignored if config.head == "imagenet" else f"{member.ignored}|{CLASSIFIER}"
    loaded, report = match.load_weights(variables, pretrained.arrays, ignored)
    field = f"backbone.weights={pretrained.source!r} as {config.name}"
    report.check(config.allow_partial, field)
    return loaded, report


def of_classifier(name: str) -> bool:
    """Returns whether a key is a parameter of the published classifier."""
    return re.fullmatch(CLASSIFIER, name) is not None


CLASSIFIER = r"(_?fc|classifier|last_linear|head|head_dist)(\.\d)?\.(weight|bias)"
