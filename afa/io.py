"""Files: written whole or not at all, digests, locks, and where caches lie."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from afa.errors import UserError

PROGRAM_CACHE = "AFA_PROGRAM_CACHE"  # environment: auto, off, or a directory (`afa.runtime`)

# ---- writing -----------------------------------------------------------------------------------


def write_atomically(path: Path | str, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a new file, syncs it to disk, then puts it in the place of `path`.

    When `write` fails, the file that was there stays as it was and nothing is left beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def write_bytes(path: Path | str, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    write_atomically(path, lambda file: file.write(content))


def write_json(path: Path | str, obj: Any) -> None:
    """Writes `obj` as indented JSON, whole or not at all.

    Takes what `plain` takes: dataclasses, mappings, sequences, arrays, paths and numbers.
    """
    text = json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def plain(value: Any) -> Any:
    """`value` in JSON's own types; keys become strings, and non-finite numbers, which JSON does not
    have, the strings "NaN", "Infinity" and "-Infinity".

    Raises:
      TypeError: something has no meaning in JSON.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _spelled(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    as_list = getattr(value, "tolist", None)  # NumPy and JAX arrays and scalars
    if as_list is not None:
        return plain(as_list())
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
        return [plain(v) for v in value]
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def _spelled(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def require_writable(directory: Path, field: str) -> None:
    """Looks whether files can be written in a directory, which need not exist yet.

    Args:
      directory: itself, or else the nearest one above it that exists, is tried; nothing is left.
      field: what the user calls it.

    Raises:
      UserError: it is no directory, or cannot be written.
    """
    place = _existing(directory)
    try:
        if not place.is_dir():
            raise NotADirectoryError(0, f"{place} is no directory")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{field}={directory}: cannot be written ({error.strerror})") from None


# ---- digests -----------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joint_sha256(digests: Iterable[str]) -> str:
    """SHA-256 of several digests in their order, in hexadecimal: the identity of several files."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# ---- locks -------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Holds an advisory lock on a file, which is made when missing; the system lets go of it when
    the process dies.

    Args:
      path: of the file.
      busy: what is told when another holds it; None waits instead.

    Raises:
      UserError: another process or thread holds it.
    """
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except OSError:
            raise UserError(busy) from None
        yield


# ---- places ------------------------------------------------------------------------------------


def expanded(field: str, path: Path | str) -> Path:
    """A path of the user's, in which ~ is the home directory.

    Raises:
      UserError: it begins with ~, and no such directory is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{field}={str(path)!r}: ~ stands for no directory here (no HOME, or no such user)"
        ) from None


def cache_home() -> Path:
    """Where what can be made again is kept: ~/.cache/afa, or, for a user without a home that can be
    written (in containers), afa-cache-UID in the directory for temporary files."""
    with contextlib.suppress(RuntimeError):  # no HOME, and a user that the system does not know
        found = Path.home() / ".cache" / "afa"
        if found.is_dir() or os.access(_existing(found), os.W_OK):
            return found
    return Path(tempfile.gettempdir()) / f"afa-cache-{os.getuid()}"


def _existing(path: Path) -> Path:
    """Itself, or else the nearest directory above it that exists."""
    place = path.absolute()
    while not (place.exists() or place.is_symlink()):
        place = place.parent
    return place
