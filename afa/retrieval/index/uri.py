"""Addresses of indexes: `exact://`, `scann://?leaves=2000`, `milvus://host:19530/gallery`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from afa.errors import UserError, choose, nearest

FIELD = "retrieval.index"


@dataclass(frozen=True)
class Address:
    """An address, taken apart.

    Attributes:
      text: as it was given.
      scheme: which engine.
      place: what stands between `://` and `?`.
      options: what stands behind `?`.
    """

    text: str
    scheme: str
    place: str
    options: Mapping[str, str]

    def read(self, kinds: Mapping[str, type]) -> dict[str, Any]:
        """The options with their types.

        Args:
          kinds: name of each option that the engine knows and its type: int, float, bool or str.

        Raises:
          UserError: an option that it does not know, or a value of another type.
        """
        values = {}
        for name, word in self.options.items():
            if name not in kinds:
                allowed = ", ".join(sorted(kinds)) or "none"
                raise UserError(
                    f"{FIELD}={self.text!r}: {name} is no option of {self.scheme}://"
                    f"{nearest(name, kinds)} (allowed: {allowed})"
                )
            values[name] = self._value(name, word, kinds[name])
        return values

    def _value(self, name: str, word: str, kind: type) -> Any:
        if kind is bool:
            return choose(f"{FIELD}: {name}", word, {"true": True, "false": False})
        try:
            return kind(word)
        except ValueError:
            what = {int: "whole number", float: "number"}[kind]
            raise UserError(f"{FIELD}={self.text!r}: {name}={word!r} is no {what}") from None


def parse(text: str, schemes: Mapping[str, Any]) -> Address:
    """Takes an address apart.

    Args:
      text: SCHEME://[PLACE][?OPTION=VALUE&...]
      schemes: the ones there are.

    Raises:
      UserError: no such address, or a scheme that there is not.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        allowed = ", ".join(f"{name}://" for name in schemes)
        raise UserError(f"{FIELD}={text!r} is no address{nearest(text, schemes)} ({allowed})")
    choose(FIELD, scheme, schemes)
    place, _, query = rest.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    names = [name for name, _ in options]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{FIELD}={text!r}: {twice} stands there twice")
    if "#" in text:
        raise UserError(f"{FIELD}={text!r}: # has no meaning there")
    return Address(text, scheme, place, dict(options))
