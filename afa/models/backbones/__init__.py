"""Backbones, one file a family. A family's file holds `DEPTHS` (its members) and `build`; every
file of this folder is found by itself.

Contract: `lower(picture, train, branch) -> mid map`, `upper(mid map, train, branch) -> last map`.
"""

import importlib
import pkgutil
from typing import Any, Literal

from afa.errors import choose
from afa.models import layers

FAMILIES = {
    member: module
    for info in pkgutil.iter_modules(__path__)
    for module in (importlib.import_module(f"{__name__}.{info.name}"),)
    for member in module.DEPTHS
}


def build(name: str, stem: Literal["imagenet", "small"], dtype: layers.Dtype) -> Any:
    """The named backbone.

    Raises:
      UserError: no family has such a member.
    """
    return choose("backbone.name", name, FAMILIES).build(name, stem, dtype)
