"""A restricted unpickler: data out of a pickle, without running anything that the file holds.

A pickle is a program. `Reader` never imports a name: it knows the few calls that dictionaries and
NumPy arrays are made of as stand-ins of its own, and refuses the file at the first other one. What
a reader needs beside them it adds to `calls`.
"""

import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

NUMBERS = "biuf"  # kinds of NumPy types that hold numbers alone
LATIN = ("latin1", "latin-1", "iso-8859-1")


class Refused(Exception):
    """The file holds something else than it may, or is damaged; the message says what."""


class Known:
    """A function or constant that a pickle may name, and can neither look into nor change."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any) -> Any:
        return self.value(*args)

    def __setstate__(self, state: Any) -> None:
        raise Refused("it changes a function")


class Table(dict):
    """A dictionary whose attributes are not kept (the `_metadata` of a state dict)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Skipped:
    """Stands in for an object of a harmless class: takes whatever it is made of, and keeps nothing.

    Found on the class and on its instances alike, so that a pickle changes neither.
    """

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> "Skipped":
        return super().__new__(cls)

    @staticmethod
    def __setstate__(*args: Any) -> None:
        pass

    __setitem__ = append = extend = add = __setstate__


class Kind:
    """A NumPy type in the making: its name, then its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in NUMBERS:
            raise Refused(f"it holds an array of {name!r}, and only numbers are read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise Refused("it holds an array of an unknown byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A NumPy array in the making: empty, then filled."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, content = state
        self.values = _array(content, kind, shape, "F" if by_columns else "C")


def _array(content: Any, kind: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
    if not isinstance(kind, Kind) or not isinstance(content, bytes | bytearray | str):
        raise Refused("it holds an array of something else than numbers")
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
    ("__builtin__", "bytes"): lambda: b"",  # of no bytes alone; others are text, encoded
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
    """Refuses every name that is neither in `calls` nor matches `skipped`.

    Attributes:
      calls: (module, name) -> what stands in for it.
      skipped: regular expression of "module.name" of classes whose objects are left out.
      wanted: what the file should hold, for the error.
      otherwise: what to do with another file, for the error.
    """

    calls: ClassVar[Mapping[tuple[str, str], Any]] = CALLS
    skipped: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")
    wanted: ClassVar[str] = "plain values are"
    otherwise: ClassVar[str] = ""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.calls:
            return Known(self.calls[module, name])
        if self.skipped.fullmatch(f"{module}.{name}"):
            return Skipped
        told = f"it calls {module}.{name}, and only {self.wanted} read from a pickle"
        raise Refused(told + self.otherwise)

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("it refers to something outside of it")
