"""Tensors out of PyTorch's files, without PyTorch and without running what they hold.

A pickle is a program. This reader knows the few calls that a dictionary of tensors is made of and
refuses the file at the first other one.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # opens the files of PyTorch before 1.6, as a pickled number

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class Refused(Exception):
    """The file holds something else than tensors, or is damaged; the message says what."""


class Storage(NamedTuple):
    """What a tensor is a view of, before its bytes are known."""

    key: str
    dtype: np.dtype


class Lazy(NamedTuple):
    """A tensor, before its bytes are known."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, buffers: dict[str, bytes]) -> np.ndarray:
        """The values, from the bytes of its storage."""
        flat = np.frombuffer(buffers[self.storage.key], self.storage.dtype)
        size = flat.itemsize
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        count = math.prod(self.shape)
        inside = self.offset >= 0 and min(self.strides, default=0) >= 0 and last < len(flat)
        if count > len(flat) or (count and not inside):
            raise Refused("a tensor reaches beyond its data")
        view = np.lib.stride_tricks.as_strided(
            flat[self.offset :], self.shape, [s * size for s in self.strides], writeable=False
        )
        return np.ascontiguousarray(view)


def _tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Lazy:
    return Lazy(storage, int(offset), tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> Any:
    return data


CALLS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CALLS:
            raise Refused(f"it calls {module}.{name}, and only tensors are read from a pickle")
        return CALLS[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise Refused("it refers to something else than a tensor's data")
        _, dtype, key, *_ = pid
        if not isinstance(dtype, np.dtype):
            raise Refused("its tensors are of an unknown type")
        return Storage(str(key), dtype)


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, of either format: dictionaries, lists and numbers as they are,
    tensors as arrays.

    Raises:
      Refused: the file is damaged, or holds something else.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_stream(path)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"it is damaged or no PyTorch file ({type(error).__name__})") from None


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if (broken := archive.testzip()) is not None:
            raise Refused(f"it is damaged ({broken})")
        inside = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if not inside:
            raise Refused("it is a zip file without tensors")
        root = inside[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise Refused("its bytes are in big-endian order")
        tree = _Reader(io.BytesIO(archive.read(inside[0]))).load()
        buffers = {key: archive.read(f"{root}data/{key}") for key in _storages(tree)}
    return _filled(tree, buffers)


def _read_stream(path: Path) -> Any:
    with path.open("rb") as file:
        if _Reader(file).load() != MAGIC:
            raise Refused("it is no PyTorch file")
        _Reader(file).load()  # version
        if not _Reader(file).load().get("little_endian", True):
            raise Refused("its bytes are in big-endian order")
        tree = _Reader(file).load()
        sizes = {storage.key: storage.dtype.itemsize for storage in _storages(tree).values()}
        buffers = {}
        for key in _Reader(file).load():
            (count,) = struct.unpack("<q", file.read(8))
            wanted = count * sizes.get(str(key), 0)
            buffers[str(key)] = file.read(wanted)
            if len(buffers[str(key)]) != wanted or not wanted:
                raise Refused("it ends too early")
    return _filled(tree, buffers)


def _storages(tree: Any) -> dict[str, Storage]:
    if isinstance(tree, Lazy):
        return {tree.storage.key: tree.storage}
    if isinstance(tree, dict):
        tree = list(tree.values())
    found: dict[str, Storage] = {}
    if isinstance(tree, list | tuple):
        for each in tree:
            found |= _storages(each)
    return found


def _filled(tree: Any, buffers: dict[str, bytes]) -> Any:
    if isinstance(tree, Lazy):
        return tree.read(buffers)
    if isinstance(tree, dict):
        return {key: _filled(value, buffers) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_filled(each, buffers) for each in tree]
    return tree
