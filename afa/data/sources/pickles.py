"""Plain values out of a pickle, without running what it holds.

A pickle is a program. This reader knows the few calls that lists, dictionaries and NumPy arrays of
numbers are made of, as stand-ins of its own, and refuses the file at the first other one.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from afa.errors import UserError

NUMBERS = "biuf"  # kinds of NumPy types that hold numbers alone
LATIN = ("latin1", "latin-1", "iso-8859-1")


class Refused(Exception):
    """The file holds something else than plain values; the message says what."""


class Call:
    """A function that a pickle may call, and can neither look into nor change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise Refused("it changes a function")


class Kind:
    """A NumPy type in the making: its name, then its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(name)
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


CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): lambda *_: Array(),
    ("numpy", "dtype"): lambda name, *_: Kind(name),
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): dict,
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


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Call:
        if (module, name) not in CALLS:
            raise Refused(f"it calls {module}.{name}, and only plain values are read from a pickle")
        return Call(CALLS[module, name])

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("it refers to something outside of it")


def read_pickle(path: Path) -> Any:
    """Dictionaries, lists, tuples, text, numbers and arrays of numbers; text of Python 2 too.

    Raises:
      UserError: the file cannot be read, is damaged, or holds something else.
    """
    try:
        with path.open("rb") as file:
            return _plain(_Reader(file, encoding="latin1").load())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Refused as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever a damaged pickle comes up with
        raise UserError(f"{path}: is damaged or no pickle ({type(error).__name__})") from None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic):
        return value
    if isinstance(value, Array):
        return value.values
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(each) for each in value)
    raise Refused("it holds something else than plain values")
