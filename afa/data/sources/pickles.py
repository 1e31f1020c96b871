"""Reads plain values from a pickle without executing code (`afa.unpickle`)."""

from pathlib import Path
from typing import Any

import numpy as np

from afa.errors import UserError
from afa.unpickle import Array, Reader, Refused


def read_pickle(path: Path) -> Any:
    """Reads dictionaries, lists, tuples, strings (of Python 2 too), numbers and numeric arrays.

    Raises:
      UserError: the file cannot be read, is damaged, or holds other objects.
    """
    try:
        with path.open("rb") as file:
            return _plain(Reader(file, encoding="latin1").load())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Refused as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: is damaged or not a pickle ({type(error).__name__})") from None


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
    raise Refused("it holds other objects than plain values")
