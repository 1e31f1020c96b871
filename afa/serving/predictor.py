"""Embeds images with a package of a trained run, without training code.

It needs JAX, NumPy, safetensors and an image decoder. A package contains a copy of this file and of
its imports, so that it runs on its own:

    cd PACKAGE && python -m afa.serving.predictor --check IMAGE.jpg

prints one JSON object per image, {"image": ..., "vector": [...]}.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import Array, Float32, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load

from afa.data.images import UnreadableImage, evaluation_view
from afa.data.types import RawImage
from afa.errors import EXIT_CLOSED_PIPE, EXIT_USER_ERROR, UserError, choose, drop_unread

MANIFEST = "manifest.json"
KIND = "afa predictor"
FORMAT = 1
WEIGHTS, CHECK = "weights.safetensors", "check.safetensors"
# What `jax.export` promises of a program (its documentation, "Compatibility guarantees").
PROMISE = (
    "JAX promises to read a program with the versions of six months after the one that wrote it, "
    "and with versions that are at most three weeks older"
)
ANY = "any"  # batch size of a program that takes any
# Batch sizes that such a program is compiled for; views are padded to one of them.
ANY_ROWS = (1, 4, 16, 64, 256)

Program = Callable[[Mapping[str, Array], Any], Array]


class Predictor:
    """Embeds images as the run embedded its gallery.

    Thread-safe. A program is compiled at its first call; `check` calls all of them, to compile them
    before the first query.

    Attributes:
      manifest: content of `manifest.json`.
      size: side of a view in pixels.
      dimension: dimension of a vector.
      rows: batch sizes; the last batch is padded.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        programs: Mapping[int, Program],
        weights: Mapping[str, Array],
        known: Mapping[str, np.ndarray],
    ) -> None:
        self.manifest, self._programs, self._weights = manifest, programs, weights
        self._known = known
        self._crop: float = manifest["preprocessing"]["crop_fraction"]
        self.size: int = manifest["preprocessing"]["image_size"]
        self.dimension: int = manifest["dimension"]
        self.rows = tuple(sorted(programs))

    @classmethod
    def load(cls, directory: Path | str, family: str | None = None) -> "Predictor":
        """Loads a package and checks its files against the manifest.

        Args:
          directory: of the package.
          family: programs to use, a key of `families` in the manifest; None for "cpu" if JAX has
            only the CPU, else "accelerator".

        Raises:
          UserError: no package, a package of another version, a file that is missing, changed or
            damaged, or no program for the platform of JAX.
        """
        directory = Path(directory)
        manifest = _manifest(directory)
        current = platform()
        try:
            families = manifest["families"]
            family = family or ("cpu" if current == "cpu" else "accelerator")
            chosen = choose("family", family, families)
            if current not in chosen["platforms"]:
                supported = ", ".join(chosen["platforms"])
                raise UserError(f"{directory}: its programs run on {supported}, not on {current}")
            content = {
                name: _read(directory, name, manifest["files"])
                for name in (*chosen["programs"].values(), WEIGHTS, CHECK)
            }
            programs = _programs(directory, chosen["programs"], content, manifest["jax"])
            arrays, known = (_arrays(directory / n, content[n]) for n in (WEIGHTS, CHECK))
            weights = {name: jax.device_put(arrays[name]) for name in manifest["arguments"]}
            return cls(manifest, programs, weights, {n: known[n] for n in ("views", "vectors")})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{directory / MANIFEST} is damaged: {error!r}") from None

    def view(self, image: RawImage) -> UInt8[np.ndarray, "s s 3"]:
        """Returns the input of the network: the resized and cropped image.

        Args:
          image: encoded or decoded.

        Raises:
          UnreadableImage: it cannot be decoded.
        """
        return evaluation_view(image, self.size, self._crop)

    def embed(self, views: UInt8[np.ndarray, "n s s 3"]) -> Float32[np.ndarray, "n d"]:
        """Embeds views; returns unit vectors.

        Raises:
          UserError: views of another size.
        """
        if views.shape[1:] != (self.size, self.size, 3):
            side = f"(n, {self.size}, {self.size}, 3)"
            raise UserError(f"views of shape {views.shape} are not of shape {side}")
        parts = [np.zeros((0, self.dimension), np.float32)]
        for rows, block in _blocks(views, self.rows):
            padded = np.concatenate([block, np.repeat(block[-1:], rows - len(block), axis=0)])
            parts.append(np.asarray(self._programs[rows](self._weights, padded))[: len(block)])
        return np.concatenate(parts)

    def embed_images(self, images: Sequence[RawImage]) -> Float32[np.ndarray, "n d"]:
        """Embeds images; returns unit vectors.

        Raises:
          UnreadableImage: an image cannot be decoded.
        """
        shape = (len(images), self.size, self.size, 3)
        views = np.array([self.view(each) for each in images], np.uint8)
        return self.embed(views.reshape(shape))

    def check(self, rows: Sequence[int] | None = None) -> float:
        """Returns the largest distance to the vectors that the run computed for the same views.

        Rounding alone gives less than 1e-5; bfloat16 or another kind of device give more.

        Args:
          rows: batch sizes to check; None for all.
        """
        views, vectors = self._known["views"], self._known["vectors"]
        distance = 0.0
        for count in self.rows if rows is None else rows:
            # Each view is once the first of a batch, followed by the others.
            blocks = [np.resize(views[i:], (count, *views.shape[1:])) for i in range(len(views))]
            found = [np.asarray(self._programs[count](self._weights, block))[0] for block in blocks]
            distance = max(distance, float(np.linalg.norm(found - vectors, axis=1).max()))
        return distance


def _blocks(
    views: UInt8[np.ndarray, "n s s 3"], rows: Sequence[int]
) -> Iterator[tuple[int, UInt8[np.ndarray, "m s s 3"]]]:
    """Yields (batch size, views): the largest batch size of which at least half is used."""
    begin = 0
    while left := len(views) - begin:
        size = max((n for n in rows if n <= 2 * left), default=min(rows))
        yield size, views[begin : begin + size]
        begin = min(begin + size, len(views))


def platform() -> str:
    """Returns the platform of JAX, as named by `jax.export`."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} contains no package: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"{directory} contains no package: {MANIFEST} is not that of a package")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{directory} is a package of format {manifest.get('format')}, this version reads "
            f"format {FORMAT}"
        )
    least = export.minimum_supported_calling_convention_version
    most = export.maximum_supported_calling_convention_version
    version = manifest.get("calling_convention")
    if not isinstance(version, int) or not least <= version <= most:
        raise UserError(
            f"{directory} was written by jax {manifest.get('jax')} (calling convention {version}),"
            f" and jax {jax.__version__} reads {least} to {most}: install that jax"
        )
    return manifest


def _read(directory: Path, name: str, files: Mapping[str, Any]) -> bytes:
    """Reads a file of the package and checks its digest."""
    path = directory / name
    if name not in files or Path(name).name != name:
        raise UserError(f"{directory / MANIFEST} is damaged: {name!r} is not one of its files")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
        raise UserError(f"{path} is not the file {MANIFEST} names (sha256 differs)")
    return content


def _programs(
    directory: Path, names: Mapping[str, str], content: Mapping[str, bytes], writer: str
) -> dict[int, Program]:
    """Returns batch size -> program; `writer` is the version of JAX that wrote them."""
    found = {}
    for rows, name in names.items():
        program = jax.jit(_program(directory / name, content[name], writer).call)
        found |= dict.fromkeys(ANY_ROWS if rows == ANY else (int(rows),), program)
    return found


def _program(path: Path, content: bytes, writer: str) -> export.Exported:
    try:
        program = export.deserialize(bytearray(content))
        # JAX 0.7 reads programs of 0.10, but without their devices, and fails when they are called.
        known, reason = program.nr_devices == 1, "no devices"
    except ImportError:
        raise UserError("reading a program needs flatbuffers (pip install flatbuffers)") from None
    except Exception as error:  # a matching digest does not make the content valid
        program, known, reason = None, False, type(error).__name__
    if program is not None and known:
        return program
    if writer != jax.__version__:
        raise UserError(
            f"{path} was written by jax {writer}, and jax {jax.__version__} cannot read it "
            f"({reason}): install jax {writer}, or package the run again. {PROMISE}"
        )
    raise UserError(f"{path} is not a jax.export program ({reason})")


def _arrays(path: Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        return load(content)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error})") from None


# ---- command -------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    options.add_argument("images", nargs="*", type=Path, metavar="IMAGE")
    options.add_argument(
        "--package", type=Path, default=Path(), metavar="DIR", help="default: working directory"
    )
    options.add_argument(
        "--check", action="store_true", help="first print the distance to the run's own vectors"
    )
    chosen = options.parse_args(words)
    try:
        predictor = Predictor.load(chosen.package)
        if chosen.check:
            writer = predictor.manifest["jax"]
            print(f"written by jax {writer}, read by {jax.__version__}. {PROMISE}", file=sys.stderr)
            print(f"at most {predictor.check():.1e} from the run's own vectors", file=sys.stderr)
        for path in chosen.images:
            vector = predictor.embed(_view(predictor, path)[None])[0]
            print(json.dumps({"image": str(path), "vector": vector.tolist()}), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        if not drop_unread():
            raise
        return EXIT_CLOSED_PIPE
    return 0


def _view(predictor: Predictor, path: Path) -> UInt8[np.ndarray, "s s 3"]:
    try:
        return predictor.view(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnreadableImage as error:
        raise UserError(f"{path}: is not a readable image ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
