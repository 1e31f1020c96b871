"""Backbones: one file per family, which defines `MEMBERS`. All files of this folder are registered.

A member is built from `Options` as a linen module with these methods:

  lower(image, train, branch) -> mid map       input of the local head and of the perturbation
  upper(mid map, train, branch) -> last map    input of the global head
  logits(last map) -> (b, classes)             the published classifier, if `classes` is not 0
  STAGES                                       regular expressions of parameter names, one per
                                               stage from the input on; stages can be frozen

Submodules have the names of the published weights (torchvision's, otherwise timm's), with dots: the
parameter `layer1.0` / `conv1` / `kernel` corresponds to `layer1.0.conv1.weight`, so that no table
of names is needed. A network whose maps are tokens also has `grid(mid)` and `pool(last)`; see
`vit`.
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
    """Returns the named backbone.

    Raises:
      UserError: unknown backbone.
    """
    return choose("backbone.name", name, MEMBERS)


def family(name: str) -> str:
    """Returns the family of a backbone, which is the name of its file."""
    return next(file for file, members in FAMILIES.items() if name in members)


def build(name: str, options: Options) -> Any:
    """Builds the named backbone as a linen module.

    Raises:
      UserError: unknown backbone, or a stem that it does not have.
    """
    chosen = member(name)
    if options.stem not in chosen.stems:
        supported = ", ".join(sorted(n for n, m in MEMBERS.items() if options.stem in m.stems))
        raise UserError(
            f"backbone.stem={options.stem!r}: {name} has no such stem (allowed: {supported})"
        )
    return chosen.build(options)
