"""Addresses of indexes: `exact://`, `scann://?leaves=2000`, `milvus://host:19530/gallery`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from afa.errors import UserError, choose, nearest

FIELD = "retrieval.index"


@dataclass(frozen=True)
class Address:
    """A parsed address.

    Attributes:
      text: the address as given.
      scheme: name of the engine.
      location: text between `://` and `?`.
      options: options after `?`.
    """

    text: str
    scheme: str
    location: str
    options: Mapping[str, str]

    def read(self, kinds: Mapping[str, type]) -> dict[str, Any]:
        """Converts the options to their types.

        Args:
          kinds: options of the engine, name -> type: int, float, bool or str.

        Raises:
          UserError: an unknown option, or a value of another type.
        """
        values = {}
        for name, word in self.options.items():
            if name not in kinds:
                allowed = ", ".join(sorted(kinds)) or "none"
                raise UserError(
                    f"{FIELD}={self.text!r}: {name} is not an option of {self.scheme}://"
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
            raise UserError(f"{FIELD}={self.text!r}: {name}={word!r} is not a {what}") from None


def parse(text: str, schemes: Mapping[str, Any]) -> Address:
    """Parses an address.

    Args:
      text: SCHEME://[LOCATION][?OPTION=VALUE&...]
      schemes: known schemes.

    Raises:
      UserError: a malformed address, or an unknown scheme.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        allowed = ", ".join(f"{name}://" for name in schemes)
        raise UserError(f"{FIELD}={text!r} is not an address{nearest(text, schemes)} ({allowed})")
    choose(FIELD, scheme, schemes)
    location, _, query = rest.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    names = [name for name, _ in options]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{FIELD}={text!r}: {twice} is given twice")
    if "#" in text:
        raise UserError(f"{FIELD}={text!r}: # is not allowed")
    return Address(text, scheme, location, dict(options))
