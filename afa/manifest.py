"""Atomic replacement of the files of an export or index, safe if the process is killed.

A directory is an export or an index if it contains the manifest, `index.json`. New files are
written to a temporary folder and moved to names that contain the hash of their content. Then the
manifest is replaced atomically, and files that it no longer names are deleted.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.io import file_sha256, locked

MANIFEST = "index.json"
FORMAT = 2
# Fields set by the writer of an export or index; the caller sets all others.
OWN_FIELDS = ("format", "count", "dimension", "sha256", "shards", "removed", "engine")
STAGE_PREFIX = ".writing-"
LOCK = ".lock"
# Required fields of a manifest, and of each of its files with rows.
FIELDS = {"count": int, "dimension": int, "sha256": str, "shards": list, "configuration": dict,
          "checkpoint": str, "preprocessing": dict}  # fmt: skip
SHARD = {"file": str, "rows": int, "sha256": str}
OURS = ("embeddings-*.parquet", "removed-*.npy", "scann-*")


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yields an empty temporary folder in `directory`; it is deleted afterwards, also after errors.

    Deletes first what a killed writer left.

    Raises:
      UserError: the disk is full or not writable, or another process is writing to the directory.
    """
    stage = directory / f"{STAGE_PREFIX}{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        busy = f"{directory}: another process is writing there; wait for it"
        with locked(directory / LOCK, busy):
            for leftover in directory.glob(f"{STAGE_PREFIX}*"):
                shutil.rmtree(leftover)
            stage.mkdir()
            yield stage
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {directory}: {reason}; its content is unchanged") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, directory: Path, manifest: dict[str, Any], keep: Iterable[str]) -> None:
    """Moves staged files into `directory`, replaces the manifest, deletes old files.

    Args:
      stage: from `staged`; names of its files and folders contain the hash of their content.
      directory: directory of the export or index.
      manifest: JSON values.
      keep: names of existing files that the new manifest names.
    """
    draft = stage / MANIFEST
    draft.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new = [path for path in stage.iterdir() if path != draft]
    for path in new:
        _sync(path)
        _move(path, directory / path.name)
    _sync(draft)
    draft.replace(directory / MANIFEST)
    named = {path.name for path in new} | set(keep)
    for old in (path for kind in OURS for path in directory.glob(kind)):
        if old.name not in named:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def read_manifest(directory: Path, what: str = "index") -> dict[str, Any]:
    """Returns the manifest of an export or index.

    Raises:
      UserError: there is none, it is not JSON, has another format, or lacks a required field.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} contains no finished {what}: {MANIFEST} is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        version = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{path} has format {version}, this version reads format {FORMAT}")
    _check_fields(path, "", manifest, FIELDS)
    for i, shard in enumerate(manifest["shards"]):
        _check_fields(path, f"shards[{i}]", shard, SHARD)
    for name, fields in {"removed": SHARD, "engine": {"uri": str}}.items():
        if manifest.get(name) is not None:
            _check_fields(path, name, manifest[name], fields)
    return manifest


def _check_fields(path: Path, prefix: str, values: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: {prefix} is {values!r}; create it again")
    for name, kind in fields.items():
        field = f"{prefix}.{name}" if prefix else name
        if name not in values:
            raise UserError(f"{path} is damaged: it lacks {field}; create it again")
        if type(values[name]) is not kind:
            raise UserError(f"{path} is damaged: {field} is {values[name]!r}; create it again")


def refuse_if_changed(directory: Path, manifest: dict[str, Any]) -> None:
    """Refuses to overwrite changes of another process.

    Args:
      manifest: the manifest when the directory was last opened or saved.

    Raises:
      UserError: the manifest has changed or is missing.
    """
    if read_manifest(directory) != json.loads(json.dumps(manifest)):
        raise UserError(
            f"{directory} was changed by another process since it was opened; open it again"
        )


def named_by_content(path: Path, kind: str, suffix: str) -> tuple[Path, str]:
    """Renames a staged file to KIND-HASHSUFFIX; returns its new path and its sha256."""
    digest = file_sha256(path)
    return path.rename(path.with_name(f"{kind}-{digest[:12]}{suffix}")), digest


def check_file(path: Path, sha256: str) -> None:
    """Checks that a file exists and has the content that the manifest names.

    Raises:
      UserError: it is missing or changed.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, though {MANIFEST} names it; create it again")
    if file_sha256(path) != sha256:
        raise UserError(f"{path} is not the file {MANIFEST} names (sha256 differs)")


def _sync(path: Path) -> None:
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _move(path: Path, target: Path) -> None:
    # The name contains the digest of the content: an existing folder is the same one, or damaged.
    if not target.is_dir():
        path.replace(target)
    elif _sums(path) == _sums(target):
        shutil.rmtree(path)
    else:
        target.rename(path.with_name(f"damaged-{target.name}"))  # deleted with the stage
        path.rename(target)


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}
