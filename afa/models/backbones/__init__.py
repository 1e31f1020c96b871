"""Backbones, one file a family. A family's file holds `MEMBERS`; every file of this folder is found
by itself.

A member is built with `Options` into a linen module of this contract:

  lower(image, train, branch) -> mid map     the local view is made of it, and pushed
  upper(mid map, train, branch) -> last map    the global view is made of it
  logits(last map) -> (b, classes)             the original classifier, where `classes` is not 0
  STAGES                                       names of its parts from the image upwards, as
                                               regular expressions: what can be frozen

Parts carry the names that published weights have (torchvision's, or timm's where it has none), with
dots: the parameter of `layer1.0` / `conv1` / `kernel` is read from and written to
`layer1.0.conv1.weight`, and no family needs a table of names. A network whose maps are tokens has
two more methods, `grid(mid)` and `pool(last)`; see `vit`.
"""

import importlib
import pkgutil
from typing import Any

from afa.errors import UserError, choose
from afa.models.backbones.contract import Member, Options

FAMILIES: dict[str, dict[str, Member]] = {
    info.name: importlib.import_module(f"{__name__}.{info.name}").MEMBERS
    for info in pkgutil.iter_modules(__path__)
    if info.name != "contract"
}
MEMBERS = {name: member for family in FAMILIES.values() for name, member in family.items()}


def names() -> list[str]:
    """Names of all backbones, sorted: the values of `backbone.name`.

    >>> import afa
    >>> "resnet50" in afa.backbones()
    True
    """
    return sorted(MEMBERS)


def member(name: str) -> Member:
    """The named backbone.

    Raises:
      UserError: no family has such a member.
    """
    return choose("backbone.name", name, MEMBERS)


def family(name: str) -> str:
    """Name of the family, and of the file, of a backbone."""
    return next(file for file, members in FAMILIES.items() if name in members)


def build(name: str, options: Options) -> Any:
    """The named backbone as a linen module.

    Raises:
      UserError: no family has such a member, or it has no such stem.
    """
    chosen = member(name)
    if options.stem not in chosen.stems:
        able = ", ".join(sorted(n for n, m in MEMBERS.items() if options.stem in m.stems))
        raise UserError(
            f"backbone.stem={options.stem!r}: {name} has none for small images (allowed: {able})"
        )
    return chosen.build(options)
