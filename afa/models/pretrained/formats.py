"""Reads one file of weights: keys -> arrays. The format is detected from the content, not from the
file name."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from afa.models.pretrained.pickles import read_torch
from afa.unpickle import Refused

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
HEADER = 100_000_000  # maximal bytes of a safetensors header, by the specification
# First bytes of files that are not weights, or have to be unpacked first.
OTHERS = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself",
    b"\x1f\x8b": "it is compressed by gzip: unpack it first",
    b"BZh": "it is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "it is compressed by xz: unpack it first",
    b"\x89HDF": "it is an HDF5 file",
    b"\x93NUMPY": "it is a single array without a name",
    b"<": "it is a web page",
}
ALLOWED = "PyTorch, safetensors, npz"


def begins(path: Path) -> bytes:
    """Returns the first 512 bytes of a file.

    Raises:
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(512)


def is_json(path: Path) -> bool:
    """Returns whether a file looks like JSON, such as the index of a sharded model."""
    return begins(path).lstrip().startswith(b"{")


def is_safetensors(path: Path) -> bool:
    """Returns whether a file looks like safetensors: a header length, then a JSON header."""
    first = begins(path)
    return first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= HEADER


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a file; keys of nested dictionaries are joined by dots.

    Raises:
      Refused: the file is damaged, of another format, or holds other objects than tensors.
      OSError: the file cannot be read.
    """
    first = begins(path)
    if not first:
        raise Refused("it is empty")
    if is_safetensors(path):
        return _safetensors(path)
    if first.startswith(ZIP):
        return _npz(path) if _has_npy_members(path) else _flat(read_torch(path))
    if first.startswith(PICKLE):
        return _flat(read_torch(path))
    if first[257:262] == b"ustar":
        raise Refused("it is a tar archive: unpack it first")
    reasons = (why for begin, why in OTHERS.items() if first.lstrip().startswith(begin))
    raise Refused(next(reasons, f"it is damaged or of an unknown format (allowed: {ALLOWED})"))


def _has_npy_members(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise Refused(f"it is damaged ({error})") from None


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise Refused(f"it is damaged or not a safetensors file ({error})") from None


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here, because `np.load` does not close a damaged file that it opened.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise Refused(f"it is damaged or not an npz file of arrays ({error})") from None


def _flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if isinstance(tree, np.ndarray):
        return {prefix: tree}
    pairs = tree.items() if isinstance(tree, dict) else ()
    pairs = enumerate(tree) if isinstance(tree, list) else pairs
    found: dict[str, np.ndarray] = {}
    for name, value in pairs:
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found
