"""A restricted unpickler: reads data from a pickle without executing code from the file.

A pickle is a program. `Reader` never imports a name: it has its own replacements for the few calls
that create dictionaries and NumPy arrays, and refuses the file at any other call. Subclasses add
further replacements to `calls`.
"""

import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

NUMBERS = "biuf"  # kinds of numeric NumPy dtypes
LATIN = ("latin1", "latin-1", "iso-8859-1")


class Refused(Exception):
    """The file has content that is not allowed, or is damaged; the message says which."""


class Known:
    """A function or constant that a pickle may name but neither read nor change."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any) -> Any:
        return self.value(*args)

    def __setstate__(self, state: Any) -> None:
        raise Refused("it changes a function")


class Table(dict):
    """A dictionary that ignores attributes (the `_metadata` of a state dict)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Skipped:
    """Replaces an object of a harmless class: accepts any arguments and stores nothing.

    `__setstate__` is static, so that a pickle can change neither the class nor its instances.
    """

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> "Skipped":
        return super().__new__(cls)

    @staticmethod
    def __setstate__(*args: Any) -> None:
        pass

    __setitem__ = append = extend = add = __setstate__


class Kind:
    """A NumPy dtype under construction: from its name, then its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in NUMBERS:
            raise Refused(f"it contains an array of {name!r}, and only numbers are read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise Refused("it contains an array of an unknown byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A NumPy array under construction: empty, then filled."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, content = state
        self.values = _array(content, kind, shape, "F" if by_columns else "C")


def _array(content: Any, kind: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
    if not isinstance(kind, Kind) or not isinstance(content, bytes | bytearray | str):
        raise Refused("it contains an array that is not of numbers")
    buffer = content.encode("latin1") if isinstance(content, str) else bytes(content)
    return np.frombuffer(buffer, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(kind: Any, content: Any) -> Any:
    return _array(content, kind, (), "C")[()]


def _encoded(text: str, encoding: str) -> bytes:
    if encoding not in LATIN:
        raise Refused(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


CALLS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): lambda *_: Array(),
    ("numpy", "dtype"): lambda name, *_: Kind(name),
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): Table,
    ("__builtin__", "bytes"): lambda: b"",  # empty bytes only; others are encoded text
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", lambda *_: Array()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array),
        )
    },
}


class Reader(pickle.Unpickler):
    """Unpickler that refuses every name that is neither in `calls` nor matches `skipped`.

    Attributes:
      calls: (module, name) -> replacement.
      skipped: regular expression of "module.name" of classes whose objects are skipped.
      allowed: what the file may contain, for the error.
      hint: what to do with another file, for the error.
    """

    calls: ClassVar[Mapping[tuple[str, str], Any]] = CALLS
    skipped: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")
    allowed: ClassVar[str] = "plain values are"
    hint: ClassVar[str] = ""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.calls:
            return Known(self.calls[module, name])
        if self.skipped.fullmatch(f"{module}.{name}"):
            return Skipped
        message = f"it calls {module}.{name}, and only {self.allowed} read from a pickle"
        raise Refused(message + self.hint)

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("it refers to data outside the file")
