"""Reads `Preprocessing` from the configuration files next to published weights."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from afa.errors import UserError
from afa.models.backbones.contract import Preprocessing

BYTE = 255.0
KEYS = {"mean": ("mean", "image_mean"), "std": ("std", "image_std")}


def preprocessing(
    about: Mapping[str, Any], default: Preprocessing, source: str
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Returns the preprocessing of the configuration files, and of `default` where they have none.

    If a value is above 1, the values are for images from 0 to 255 and are divided by 255.

    Args:
      about: content of the configuration files.
      default: preprocessing of the published weights of the backbone.
      source: name of the weights, for errors.

    Returns:
      The preprocessing of an image in [0, 1], and lines on what was changed.

    Raises:
      UserError: mean or std is not three numbers, or std is not positive.
    """
    nested = about.get("pretrained_cfg")
    about = {**about, **(nested if isinstance(nested, dict) else {})}
    given = {
        field: _three_numbers(about[key], key, source)
        for field, keys in KEYS.items()
        for key in keys[::-1]
        if about.get(key) is not None
    }
    notes = ()
    if any(value > 1 for values in given.values() for value in values):
        shown = ", ".join(f"{name} {[*values]}" for name, values in given.items())
        notes = (f"{shown} are for images from 0 to 255: divided by 255",)
        given = {name: tuple(v / BYTE for v in values) for name, values in given.items()}
    if not all(value > 0 for value in given.get("std", ())):
        raise UserError(f"backbone.weights={source!r}: std {[*given['std']]} must be above 0")
    found = dataclasses.replace(default, **given)
    if about.get("channels") in ("rgb", "bgr"):
        found = dataclasses.replace(found, channels=about["channels"])
    if isinstance(crop := about.get("crop_pct"), int | float) and 0 < crop <= 1:
        found = dataclasses.replace(found, crop=float(crop))
    return found, notes


def _three_numbers(value: Any, key: str, source: str) -> tuple[float, float, float]:
    """Returns three numbers, one per channel; a single number is used for all channels."""
    listed = value if isinstance(value, list) else [value] * 3
    numbers = [v for v in listed if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(listed) != 3 or len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise UserError(
            f"backbone.weights={source!r}: {key}={value!r} of its configuration is not a list of "
            "three numbers, one per channel"
        )
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
