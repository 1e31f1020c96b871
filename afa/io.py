"""Files: atomic writes, digests, locks, and the cache directory."""

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
    """Calls `write` with a new file, syncs it to disk, then renames it to `path`.

    If `write` fails, an existing file is unchanged and the new one is removed.
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
    """Writes a file atomically."""
    write_atomically(path, lambda file: file.write(content))


def write_json(path: Path | str, obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically.

    Accepts what `plain` accepts: dataclasses, mappings, sequences, arrays, paths and numbers.
    """
    text = json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def plain(value: Any) -> Any:
    """Converts `value` to JSON types. Keys become strings; non-finite numbers, which JSON does not
    have, become the strings "NaN", "Infinity" and "-Infinity".

    Raises:
      TypeError: a value has no JSON equivalent.
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
    """Checks whether files can be written in a directory, which need not exist yet.

    Args:
      directory: if it does not exist, its nearest existing parent is tested.
      field: name of the setting, for the error.

    Raises:
      UserError: it is not a directory, or not writable.
    """
    path = _existing(directory)
    try:
        if not path.is_dir():
            raise NotADirectoryError(0, f"{path} is not a directory")
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{field}={directory}: cannot be written ({error.strerror})") from None


# ---- digests -----------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joint_sha256(digests: Iterable[str]) -> str:
    """Returns the SHA-256 of several digests in hexadecimal: identifies several files."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# ---- locks -------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Takes an advisory lock on a file, which is created if missing. The system releases the lock
    when the process ends.

    Args:
      path: the lock file.
      busy: error message if the lock is taken; None: wait for it.

    Raises:
      UserError: another process or thread has the lock.
    """
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except OSError:
            raise UserError(busy) from None
        yield


# ---- paths -------------------------------------------------------------------------------------


def expanded(field: str, path: Path | str) -> Path:
    """Expands ~ in a path given by the user.

    Raises:
      UserError: there is no home directory, or no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{field}={str(path)!r}: ~ cannot be expanded (no HOME, or no such user)"
        ) from None


def cache_home() -> Path:
    """Returns the cache directory: ~/.cache/afa or, without a writable home (in containers),
    afa-cache-UID in the directory for temporary files."""
    with contextlib.suppress(RuntimeError):  # no HOME, and a user without a name
        path = Path.home() / ".cache" / "afa"
        if path.is_dir() or os.access(_existing(path), os.W_OK):
            return path
    return Path(tempfile.gettempdir()) / f"afa-cache-{os.getuid()}"


def _existing(path: Path) -> Path:
    """Returns the path, or its nearest existing parent."""
    path = path.absolute()
    while not (path.exists() or path.is_symlink()):
        path = path.parent
    return path
