"""Weights as they lie in files: names of the file's own -> arrays."""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from afa.errors import UserError
from afa.io import expanded, file_sha256, joint_sha256
from afa.models.pretrained import match
from afa.models.pretrained.pickles import Refused, read_torch

HUB = "hf://"
CHECKPOINTS = "checkpoints"  # what a run of ours has
TORCH = (".pth", ".pt", ".bin")
# In a directory the first that is there is read; an index names the files of a model in parts.
IN_DIRECTORY = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)  # fmt: skip
NOTED = "preprocessing"  # in a safetensors file of ours
NESTED = ("state_dict", "model_state_dict", "model", "teacher", "net")  # where trainers put them


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

    Raises:
      UserError: there is no such thing, it is damaged, holds something else than tensors, or (for
        hf://) is not in the cache and cannot be downloaded.
    """
    place = _download(source) if source.startswith(HUB) else expanded("backbone.weights", source)
    if (place / CHECKPOINTS).is_dir():
        return _of_run(place, source)
    if place.is_dir():
        parts = _parts(place, source)
    elif place.is_file():
        parts = [place]
    else:
        raise UserError(f"backbone.weights={source!r} does not exist")
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        arrays |= _read_one(part, source)
    if not arrays:
        raise UserError(f"backbone.weights={source!r}: no tensors in it")
    return File(source, _digest(parts), arrays, _about(parts[0]))


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


def _parts(directory: Path, source: str) -> list[Path]:
    for name in IN_DIRECTORY:
        found = directory / name
        if not found.is_file():
            continue
        if not name.endswith(".index.json"):
            return [found]
        try:
            named = sorted(set(json.loads(found.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"backbone.weights={source!r}: {name} is no index") from None
        # An index names its neighbours, and nothing elsewhere.
        parts = [directory / Path(str(each)).name for each in named]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise UserError(f"backbone.weights={source!r}: {name} names {missing[0]}, not there")
        return parts
    raise UserError(
        f"backbone.weights={source!r} is a directory without one of {', '.join(IN_DIRECTORY)}"
    )


def _read_one(path: Path, source: str) -> dict[str, np.ndarray]:
    suffix = path.suffix.lower()
    readers = {".safetensors": _safetensors, ".npz": _npz} | dict.fromkeys(TORCH, _torch)
    if suffix not in readers:
        raise UserError(
            f"backbone.weights={source!r}: {suffix or 'no suffix'} is unknown "
            f"(allowed: {', '.join(sorted(readers))})"
        )
    try:
        return readers[suffix](path)
    except Refused as reason:
        name = "" if path.name == Path(source).name else f"{path.name}: "
        raise UserError(f"backbone.weights={source!r}: {name}{reason}") from None


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise Refused(f"it is damaged or no safetensors file ({error})") from None


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here: of a damaged file `np.load` leaves open what it opened itself.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise Refused(f"it is damaged or no npz file of arrays ({error})") from None


def _torch(path: Path) -> dict[str, np.ndarray]:
    tree = read_torch(path)
    for name in NESTED:
        if isinstance(tree, dict) and isinstance(tree.get(name), dict):
            tree = tree[name]
            break
    if not isinstance(tree, dict):
        raise Refused("it holds no dictionary of tensors")
    return {str(name): value for name, value in tree.items() if isinstance(value, np.ndarray)}


def _digest(parts: Iterable[Path]) -> str:
    each = [file_sha256(part) for part in parts]
    return each[0] if len(each) == 1 else joint_sha256(each)


def _about(part: Path) -> dict[str, Any]:
    """What lies beside published weights, or in a file of our own, and says how images were
    prepared; {} if nothing."""
    found: dict[str, Any] = {}
    if part.suffix == ".safetensors":
        with safe_open(part, framework="numpy") as file, contextlib.suppress(ValueError):
            noted = json.loads((file.metadata() or {}).get(NOTED, "{}"))
            found |= noted if isinstance(noted, dict) else {}
    for name in ("config.json", "preprocessor_config.json"):
        try:
            read = json.loads((part.parent / name).read_text())
        except (OSError, ValueError):
            continue
        found |= read if isinstance(read, dict) else {}
    return found


def _download(source: str) -> Path:
    """The cached snapshot of hf://org/name[@revision], downloaded if need be."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(
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
        raise UserError(
            f"backbone.weights={source!r} is not in the cache of huggingface_hub and cannot be "
            f"downloaded ({type(error).__name__}); download it where there is a network, or name "
            "a local file"
        ) from None
