"""Writes files in the formats of `torch.save`, before and since version 1.6, without PyTorch."""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from afa.models.pretrained.pickles import MAGIC

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


class Global:
    """A global name in a pickle."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Exists only because the pickler requires a callable."""


class Storage:
    def __init__(self, key: str, values: np.ndarray) -> None:
        self.key, self.values = key, values


class Call:
    """A function call in a pickle."""

    def __init__(self, function: Global, *args: Any) -> None:
        self.function, self.args = function, args


class Raw:
    """An object, possibly an array, written as `pickle` writes it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Pickler(pickle._Pickler):  # pyright: ignore - extensible, in contrast to the one in C
    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)  # pyright: ignore

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            kind = Global("torch", STORAGES[obj.values.dtype])
            return ("storage", kind, obj.key, "cpu", obj.values.size)
        return None

    def _global(self, obj: Global) -> None:
        self.write(f"c{obj.module}\n{obj.name}\n".encode())  # pyright: ignore

    def _call(self, obj: Call) -> None:
        self.save_reduce(obj.function, obj.args)  # pyright: ignore

    def _raw(self, obj: Raw) -> None:
        self.save(obj.value)  # pyright: ignore

    dispatch[Raw] = _raw
    dispatch[Global] = _global
    dispatch[Call] = _call


def pickled(tree: Any) -> bytes:
    """Pickles a tree with the protocol of PyTorch."""
    out = io.BytesIO()
    Pickler(out, protocol=2).dump(tree)
    return out.getvalue()


def lazily(tree: Any, kept: list[Storage]) -> Any:
    """Replaces arrays by calls that create tensors from storages; appends these to `kept`."""
    if isinstance(tree, dict):
        return {key: lazily(value, kept) for key, value in tree.items()}
    if not isinstance(tree, np.ndarray):
        return tree
    kept.append(Storage(str(len(kept)), np.ascontiguousarray(tree).reshape(-1)))
    strides = tuple(step // tree.itemsize for step in np.ascontiguousarray(tree).strides)
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(rebuild, kept[-1], 0, tree.shape, strides, False, hooks)


def write_zip(path: Path, tree: Any) -> Path:
    """Writes the format since PyTorch 1.6."""
    kept: list[Storage] = []
    content = pickled(lazily(tree, kept))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for storage in kept:
            archive.writestr(f"archive/data/{storage.key}", storage.values.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(path: Path, tree: Any) -> Path:
    """Writes the format before PyTorch 1.6."""
    kept: list[Storage] = []
    content = pickled(lazily(tree, kept))
    with path.open("wb") as file:
        for head in (MAGIC, 1001, {"protocol_version": 1001, "little_endian": True}):
            file.write(pickled(head))
        file.write(content)
        file.write(pickled([storage.key for storage in kept]))
        for storage in kept:
            file.write(struct.pack("<q", storage.values.size) + storage.values.tobytes())
    return path
