"""Files that replace others as a whole: an export and its index survive a kill at any moment.

`index.json`, the manifest, is what makes a directory an export or an index. Everything it names is
written aside and moved in under a name that carries its content's hash; then the manifest is
replaced in one step, and only after that the files that nothing names any more go.
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
# Fields that the writer of an export or of an index sets; all others are its caller's.
OWN_FIELDS = ("format", "count", "dimension", "sha256", "shards", "removed", "engine")
STAGE_PREFIX = ".writing-"
LOCK = ".lock"
# What every manifest holds, and of each file with rows.
FIELDS = {"count": int, "dimension": int, "sha256": str, "shards": list, "configuration": dict,
          "checkpoint": str, "preprocessing": dict}  # fmt: skip
SHARD = {"file": str, "rows": int, "sha256": str}
OURS = ("embeddings-*.parquet", "removed-*.npy", "scann-*")


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """An empty folder inside `directory` to write in; it is gone afterwards, also after an error.

    Remains of a writer that was killed are cleared away first.

    Raises:
      UserError: the disk is full or not writable, or another process is writing there.
    """
    stage = directory / f"{STAGE_PREFIX}{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        busy = f"{directory}: another process is writing there; wait for it"
        with locked(directory / LOCK, busy):
            for left in directory.glob(f"{STAGE_PREFIX}*"):
                shutil.rmtree(left)
            stage.mkdir()
            yield stage
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {directory}: {reason}; what it held is unchanged") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def publish(stage: Path, directory: Path, manifest: dict[str, Any], keep: Iterable[str]) -> None:
    """Moves what was staged into `directory`, makes `manifest` its manifest, removes the old.

    Args:
      stage: from `staged`; files and folders in it carry the hash of their content in their name.
      directory: what is published.
      manifest: JSON values.
      keep: names of files that the new manifest names and that are there already.
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
    """The manifest of an export or of an index.

    Raises:
      UserError: there is none, it is no JSON, of another format, or lacks a field that all have.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} holds no finished {what}: {MANIFEST} is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{path} has format {found}, this version reads format {FORMAT}")
    _check_fields(path, "", manifest, FIELDS)
    for i, shard in enumerate(manifest["shards"]):
        _check_fields(path, f"shards[{i}]", shard, SHARD)
    for name, fields in {"removed": SHARD, "engine": {"uri": str}}.items():
        if manifest.get(name) is not None:
            _check_fields(path, name, manifest[name], fields)
    return manifest


def _check_fields(path: Path, where: str, found: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: {where} is {found!r}; make it again")
    for name, kind in fields.items():
        place = f"{where}.{name}" if where else name
        if name not in found:
            raise UserError(f"{path} is damaged: it lacks {place}; make it again")
        if type(found[name]) is not kind:
            raise UserError(f"{path} is damaged: {place} is {found[name]!r}; make it again")


def refuse_if_changed(directory: Path, manifest: dict[str, Any]) -> None:
    """Refuses to write over what another process published since.

    Args:
      manifest: as it was when the directory was opened or saved last.

    Raises:
      UserError: it is another one now, or gone.
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
    """Whether a file is there, and is the one the manifest names.

    Raises:
      UserError: it is missing or changed.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, though {MANIFEST} names it; make it again")
    if file_sha256(path) != sha256:
        raise UserError(f"{path} is not the file {MANIFEST} names (sha256 differs)")


def _sync(path: Path) -> None:
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _move(path: Path, target: Path) -> None:
    # A name carries the digest of the content: a folder that is there is the same one, or damaged.
    if not target.is_dir():
        path.replace(target)
    elif _sums(path) == _sums(target):
        shutil.rmtree(path)
    else:
        target.rename(path.with_name(f"damaged-{target.name}"))  # it goes with the stage
        path.rename(target)


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}
