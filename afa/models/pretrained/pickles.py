"""Reads tensors from PyTorch files, without PyTorch and without executing code from them
(`afa.unpickle`)."""

import io
import math
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from afa import unpickle
from afa.unpickle import Array, Known, Refused, Table

MAGIC = 0x1950A86A20F9469CFC6C  # first pickled number in files of PyTorch before 1.6

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


class Storage(NamedTuple):
    """Storage of a tensor, before its bytes are read."""

    key: str
    dtype: np.dtype


class Lazy(NamedTuple):
    """A tensor, before its bytes are read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, buffers: dict[str, bytes]) -> np.ndarray:
        """Returns the values from the bytes of the storages."""
        flat = np.frombuffer(buffers[self.storage.key], self.storage.dtype)
        size = flat.itemsize
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        count = math.prod(self.shape)
        inside = self.offset >= 0 and min(self.strides, default=0) >= 0 and last < len(flat)
        if count > len(flat) or (count and not inside):
            raise Refused("a tensor exceeds its storage")
        view = np.lib.stride_tricks.as_strided(
            flat[self.offset :], self.shape, [s * size for s in self.strides], writeable=False
        )
        return np.ascontiguousarray(view)


def _tensor(
    storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Lazy:
    if not isinstance(storage, Storage):
        raise Refused("it holds a tensor without storage")
    return Lazy(storage, int(offset), tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _default_dict(factory: Any = None, *_: Any) -> Table:
    return Table()


CALLS = {
    **unpickle.CALLS,
    ("collections", "defaultdict"): _default_dict,
    ("collections", "Counter"): Table,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}
# Classes of other objects in training checkpoints, which are skipped: settings, dates, paths.
HARMLESS = re.compile(
    r"""
    argparse\.Namespace | types\.SimpleNamespace | collections\.deque | uuid\.UUID
    | (builtins|__builtin__)\.(bool|bytearray|complex|dict|float|frozenset|int|list|object|range
                              |set|slice|str|tuple)
    | (copyreg|copy_reg)\._reconstructor | numpy\.random\..*
    | datetime\.\w+ | decimal\.Decimal | fractions\.Fraction | pathlib(\._local)?\.\w+
    | torch\.(device|dtype|bool|(bfloat|float|u?int|complex)\d+) | torch\.optim\..*
    | (addict|box|easydict|hydra|lightning|lightning_fabric|ml_collections|mmcv|mmengine|munch
      |omegaconf|pytorch_lightning|yacs)\..*
    """,
    re.VERBOSE,
)


class _Reader(unpickle.Reader):
    calls = CALLS
    skipped = HARMLESS
    allowed = "tensors are"
    hint = ": load it with the code that wrote it, and save its state_dict() alone"

    def persistent_load(self, pid: Any) -> Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise Refused("it refers to other data than tensor storages")
        _, kind, key, _, _, *view = pid
        if any(view):
            raise Refused(
                "its tensors share storages in the way of very old PyTorch: load it with PyTorch, "
                "and save its state_dict() again"
            )
        if not (isinstance(kind, Known) and isinstance(kind.value, np.dtype)):
            raise Refused("its tensors are of an unknown type")
        return Storage(str(key), kind.value)


def read_torch(path: Path) -> Any:
    """Reads a file of `torch.save` (zip or legacy format), or a plain pickle of arrays.

    Returns dictionaries, lists and numbers unchanged, and tensors as arrays.

    Raises:
      Refused: the file is damaged, or holds other objects.
      OSError: the file cannot be read.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_stream(path)
    except (Refused, OSError):
        raise
    except Exception as error:
        raise Refused(f"it is damaged or not a PyTorch file ({type(error).__name__})") from None


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if (broken := archive.testzip()) is not None:
            raise Refused(f"it is damaged ({broken})")
        inside = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if any("/code/" in name for name in archive.namelist()):
            raise Refused("it is a TorchScript program: save the state_dict() of the network")
        if not inside:
            raise Refused("it is a zip file without tensors")
        root = inside[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise Refused("its bytes are in big-endian order")
        tree = _load(io.BytesIO(archive.read(inside[0])))
        buffers = {key: archive.read(f"{root}data/{key}") for key in _storages(tree)}
    return _with_values(tree, buffers)


def _read_stream(path: Path) -> Any:
    with path.open("rb") as file:
        size = path.stat().st_size
        first = _load(file)
        if not (isinstance(first, int) and first == MAGIC):  # a plain pickle of arrays
            return _with_values(first, {})
        _load(file)  # version
        if not _load(file).get("little_endian", True):
            raise Refused("its bytes are in big-endian order")
        tree = _load(file)
        sizes = {storage.key: storage.dtype.itemsize for storage in _storages(tree).values()}
        buffers = {}
        for key in _load(file):
            (count,) = struct.unpack("<q", file.read(8))
            wanted = count * sizes.get(str(key), 0)
            if not 0 < wanted <= size - file.tell():  # before memory is allocated for it
                raise Refused("it is truncated")
            buffers[str(key)] = file.read(wanted)
    return _with_values(tree, buffers)


def _load(file: io.BufferedIOBase) -> Any:
    return _Reader(file, encoding="latin1").load()  # text of Python 2 too


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


def _with_values(tree: Any, buffers: dict[str, bytes]) -> Any:
    if isinstance(tree, Lazy):
        return tree.read(buffers)
    if isinstance(tree, Array):
        return tree.values
    if isinstance(tree, dict):
        return {key: _with_values(value, buffers) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_with_values(each, buffers) for each in tree]
    return tree
