"""Weights as they lie in files: names of the file's own -> arrays."""

import contextlib
import hashlib
import json
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from afa.errors import UserError
from afa.io import expanded, file_sha256, joint_sha256
from afa.models.pretrained import formats, match
from afa.unpickle import Refused

HUB = "hf://"
CHECKPOINTS = "checkpoints"  # what a run of ours has
# In a directory the first that is there is read; an index names the files of a model in parts.
IN_DIRECTORY = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)  # fmt: skip
NOTED = "preprocessing"  # in a safetensors file of ours
BESIDE = ("config.json", "preprocessor_config.json")  # say how images were prepared


class Missing(UserError):
    """The weights are not on this machine."""


@dataclass(frozen=True)
class File:
    """A file of weights.

    Attributes:
      source: what the user called it.
      sha256: of its bytes; of several files, of their digests in order.
      arrays: the file's own name -> values.
      about: what `config.json` and `preprocessor_config.json` beside it say.
    """

    source: str
    sha256: str
    arrays: dict[str, np.ndarray]
    about: dict[str, Any] = field(default_factory=dict)


def read(source: str) -> File:
    """Reads a file, a directory of files, the directory of a run of ours, or hf://org/name.

    What a file is, its content tells.

    Raises:
      Missing: there is no such thing, or (for hf://) it is not in the cache and cannot be
        downloaded.
      UserError: it may not be read, is damaged, or holds something else than tensors.
    """
    place = _download(source) if source.startswith(HUB) else expanded("backbone.weights", source)
    try:
        if not stat.S_ISREG(mode := place.stat().st_mode) and not stat.S_ISDIR(mode):
            raise UserError(f"backbone.weights={source!r} is no file")
        if (place / CHECKPOINTS).is_dir():
            return _of_run(place, source)
        parts = _parts(place, source)
        arrays: dict[str, np.ndarray] = {}
        for part in parts:
            arrays |= _read_one(part, source)
        if not arrays:
            raise UserError(f"backbone.weights={source!r}: no tensors in it")
        return File(source, _digest(parts), arrays, _about(parts[0], source))
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise Missing(f"backbone.weights={source!r} does not exist") from None
        inside = error.filename not in (None, str(place), str(place / CHECKPOINTS))
        name = f"{error.filename} " if inside else ""
        raise UserError(
            f"backbone.weights={source!r}: {name}cannot be read ({error.strerror})"
        ) from None


def _of_run(directory: Path, source: str) -> File:
    """The backbone of a run of ours: the averaged weights of its latest checkpoint."""
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
        raise UserError(f"backbone.weights={source!r}: is no run of ours ({reason})") from None
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(name.encode() + value.tobytes())
    about = {name: config[name] for name in ("mean", "std", "channels") if config.get(name)}
    return File(source, digest.hexdigest(), arrays, about)


def safetensors_of(file: File) -> bytes:
    """The content of a safetensors file of the same; what is known about it goes along."""
    return save(file.arrays, {"source": file.source, "format": "pt", NOTED: json.dumps(file.about)})


def _parts(place: Path, source: str) -> list[Path]:
    """The files of a directory, of an index, or the file itself."""
    if place.is_dir():
        there = {each.name for each in place.iterdir()}
        found = next((place / name for name in IN_DIRECTORY if name in there), None)
        if found is None:
            raise UserError(
                f"backbone.weights={source!r} is a directory without one of "
                f"{', '.join(IN_DIRECTORY)}"
            )
        place = found
    if not formats.is_json(place):
        return [place]
    try:
        named = sorted(set(json.loads(place.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"backbone.weights={source!r}: {place.name} is no index") from None
    # An index names its neighbours, and nothing elsewhere.
    parts = [place.parent / Path(str(each)).name for each in named]
    if missing := [part.name for part in parts if not part.exists()]:
        raise UserError(f"backbone.weights={source!r}: {place.name} names {missing[0]}, not there")
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
    """What lies beside published weights, or in a file of our own, and says how images were
    prepared; {} if nothing."""
    found: dict[str, Any] = {}
    if formats.is_safetensors(part):
        with safe_open(part, framework="numpy") as file, contextlib.suppress(ValueError):
            noted = json.loads((file.metadata() or {}).get(NOTED, "{}"))
            found |= noted if isinstance(noted, dict) else {}
    for name in BESIDE:
        try:
            read = json.loads((part.parent / name).read_text("utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise UserError(
                f"backbone.weights={source!r}: {name} beside it is no JSON ({error})"
            ) from None
        found |= read if isinstance(read, dict) else {}
    return found


def _download(source: str) -> Path:
    """The cached snapshot of hf://org/name[@revision], downloaded if need be."""
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
