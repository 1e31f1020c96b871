"""Weights in: somebody's file -> the variables of a backbone; and out again."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import PyTree

from afa.config import BackboneConfig
from afa.errors import UserError
from afa.models import backbones
from afa.models.backbones.contract import Member, Preprocessing
from afa.models.pretrained import files, match, names
from afa.models.pretrained.files import File
from afa.models.pretrained.match import Account
from afa.models.pretrained.names import Arrays


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights that were read, by our names, and what is known of them.

    Attributes:
      arrays: published name, as ours -> values in PyTorch's order of axes.
      source, sha256: where they come from, and the digest of those bytes.
      names: the library whose names the file has.
      preprocessing: what they expect of an image.
    """

    arrays: Arrays
    source: str
    sha256: str
    names: str
    preprocessing: Preprocessing

    def record(self) -> dict[str, Any]:
        """What is stored with a run and its index."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "names": self.names,
            "preprocessing": dataclasses.asdict(self.preprocessing),
        }


def read(config: BackboneConfig) -> Pretrained:
    """Reads `config.weights` for the network `config.name`.

    Raises:
      UserError: as `files.read`, or no such network.
    """
    backbones.member(config.name)  # a misspelt name should not wait for the file
    return understood(files.read(config.weights), config.name)


def understood(file: File, name: str) -> Pretrained:
    """What a file holds for the network `name`, by our names."""
    arrays, library = names.translated(file.arrays, backbones.family(name))
    expected = _preprocessing(file, backbones.member(name))
    return Pretrained(arrays, file.source, file.sha256, library, expected)


def fill(
    variables: Mapping[str, PyTree], pretrained: Pretrained, config: BackboneConfig
) -> tuple[dict[str, PyTree], Account]:
    """The variables of the backbone, with the weights in them.

    Args:
      variables: {"params", "batch_stats"} of the backbone alone.

    Raises:
      UserError: the weights do not fit, and `config.allow_partial` does not let them; every
        parameter that is missing, unmatched or of another shape is named.
    """
    member = backbones.member(config.name)
    # A run may do without the published classifier; nothing else may be left over.
    aside = member.aside if config.head == "imagenet" else f"{member.aside}|{CLASSIFIER}"
    filled, account = match.fill(variables, pretrained.arrays, aside)
    field = f"backbone.weights={pretrained.source!r} as {config.name}"
    account.refuse(config.allow_partial, field)
    for name in account.loaded:
        if not np.isfinite(pretrained.arrays[name].astype(np.float32)).all():
            raise UserError(f"{field}: {name} is not finite")
    return filled, account


def of_classifier(name: str) -> bool:
    """Whether a published name is that of a parameter of the classifier."""
    return re.fullmatch(CLASSIFIER, name) is not None


CLASSIFIER = r"(fc|classifier|last_linear|head|head_dist)(\.\d)?\.(weight|bias)"


def _preprocessing(file: File, member: Member) -> Preprocessing:
    """That of the network's published weights, as far as the files beside them say no other."""
    about = file.about | (file.about.get("pretrained_cfg") or {})
    found = member.preprocessing
    for field, keys in {"mean": ("mean", "image_mean"), "std": ("std", "image_std")}.items():
        value = next((about[key] for key in keys if key in about), None)
        if isinstance(value, list) and len(value) == 3:
            found = dataclasses.replace(found, **{field: tuple(float(v) for v in value)})
    if about.get("channels") in ("rgb", "bgr"):
        found = dataclasses.replace(found, channels=about["channels"])
    if isinstance(crop := about.get("crop_pct"), int | float) and 0 < crop <= 1:
        found = dataclasses.replace(found, crop=float(crop))
    return found
