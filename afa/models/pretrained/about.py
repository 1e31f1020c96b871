"""What the files beside published weights say of images -> `Preprocessing`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from afa.errors import UserError
from afa.models.backbones.contract import Preprocessing

BYTE = 255.0
KEYS = {"mean": ("mean", "image_mean"), "std": ("std", "image_std")}


def preprocessing(
    about: Mapping[str, Any], usual: Preprocessing, source: str
) -> tuple[Preprocessing, tuple[str, ...]]:
    """That of the network's published weights, as far as the files beside them say no other.

    Figures above 1 belong to images from 0 to 255 and are divided by 255.

    Returns:
      What is expected of an image in [0, 1], and lines that tell what was changed.

    Raises:
      UserError: mean or deviation is not three figures, or a deviation is not above 0.
    """
    nested = about.get("pretrained_cfg")
    about = {**about, **(nested if isinstance(nested, dict) else {})}
    said = {
        field: _figures(about[key], key, source)
        for field, keys in KEYS.items()
        for key in keys[::-1]
        if about.get(key) is not None
    }
    told = ()
    if any(figure > 1 for figures in said.values() for figure in figures):
        shown = ", ".join(f"{name} {[*figures]}" for name, figures in said.items())
        told = (f"{shown} are of images from 0 to 255: divided by 255",)
        said = {name: tuple(f / BYTE for f in figures) for name, figures in said.items()}
    if not all(figure > 0 for figure in said.get("std", ())):
        raise UserError(f"backbone.weights={source!r}: std {[*said['std']]} must be above 0")
    found = dataclasses.replace(usual, **said)
    if about.get("channels") in ("rgb", "bgr"):
        found = dataclasses.replace(found, channels=about["channels"])
    if isinstance(crop := about.get("crop_pct"), int | float) and 0 < crop <= 1:
        found = dataclasses.replace(found, crop=float(crop))
    return found, told


def _figures(value: Any, key: str, source: str) -> tuple[float, float, float]:
    """Three figures, one a channel; a single one is that of every channel."""
    listed = value if isinstance(value, list) else [value] * 3
    numbers = [v for v in listed if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(listed) != 3 or len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"backbone.weights={source!r}: {key}={value!r} beside it is no list of three figures, "
            "one a channel"
        )
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
