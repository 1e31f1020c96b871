"""Describes images with a package of a trained run: what a service needs, and no training code.

Beside JAX and NumPy it imports what decodes images and reads safetensors. A package holds a copy
of this file and of those it imports, so that the package alone serves:

    cd PACKAGE && python -m afa.serving.predictor --check IMAGE.jpg

prints one JSON object an image, {"image": ..., "vector": [...]}.
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
from afa.errors import EXIT_USER_ERROR, UserError, choose

MANIFEST = "manifest.json"
KIND = "afa predictor"
FORMAT = 1
WEIGHTS, CHECK = "weights.safetensors", "check.safetensors"
ANY = "any"  # rows of a program that takes any number
# What a program for any number of rows is compiled for: fewer programs, and some rows to spare.
ANY_ROWS = (1, 4, 16, 64, 256)

Program = Callable[[Mapping[str, Array], Any], Array]


class Predictor:
    """Images to the vectors that the run's gallery has.

    Calls may come from several threads. A program is compiled when it is first called: `check`
    calls all of them, before the first query has to wait.

    Attributes:
      manifest: what `manifest.json` says.
      size: side of a view, in pixels.
      dimension: length of a vector.
      rows: numbers of views that are described at once; what is left over is filled up.
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
        """Opens a package and checks it against its manifest.

        Args:
          family: which of the manifest's programs to take; None is "cpu" where JAX has only the
            CPU, else "accelerator".

        Raises:
          UserError: no package, one that another version wrote, a file that is missing, changed or
            damaged, or no program for what JAX computes on.
        """
        directory = Path(directory)
        manifest = _manifest(directory)
        here = platform()
        try:
            families = manifest["families"]
            family = family or ("cpu" if here == "cpu" else "accelerator")
            chosen = choose("family", family, families)
            if here not in chosen["platforms"]:
                able = ", ".join(chosen["platforms"])
                raise UserError(f"{directory}: its programs run on {able}, not on {here}")
            content = {
                name: _read(directory, name, manifest["files"])
                for name in (*chosen["programs"].values(), WEIGHTS, CHECK)
            }
            programs = _programs(directory, chosen["programs"], content)
            arrays, known = (_arrays(directory / n, content[n]) for n in (WEIGHTS, CHECK))
            weights = {name: jax.device_put(arrays[name]) for name in manifest["arguments"]}
            return cls(manifest, programs, weights, {n: known[n] for n in ("views", "vectors")})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{directory / MANIFEST} is damaged: {error!r}") from None

    def view(self, image: RawImage) -> UInt8[np.ndarray, "s s 3"]:
        """What the network sees of an image, encoded or decoded.

        Raises:
          UnreadableImage: it cannot be decoded.
        """
        return evaluation_view(image, self.size, self._crop)

    def describe(self, views: UInt8[np.ndarray, "n s s 3"]) -> Float32[np.ndarray, "n d"]:
        """Unit vectors of views.

        Raises:
          UserError: views of another size.
        """
        if views.shape[1:] != (self.size, self.size, 3):
            side = f"(n, {self.size}, {self.size}, 3)"
            raise UserError(f"views of shape {views.shape} are not of shape {side}")
        parts = [np.zeros((0, self.dimension), np.float32)]
        for rows, block in _blocks(views, self.rows):
            filled = np.concatenate([block, np.repeat(block[-1:], rows - len(block), axis=0)])
            parts.append(np.asarray(self._programs[rows](self._weights, filled))[: len(block)])
        return np.concatenate(parts)

    def describe_images(self, images: Sequence[RawImage]) -> Float32[np.ndarray, "n d"]:
        """Unit vectors of images.

        Raises:
          UnreadableImage: one cannot be decoded.
        """
        shape = (len(images), self.size, self.size, 3)
        views = np.array([self.view(each) for each in images], np.uint8)
        return self.describe(views.reshape(shape))

    def check(self, rows: Sequence[int] | None = None) -> float:
        """How far vectors are from those that the run itself has of the same views: the largest
        distance. Rounding comes to less than 1e-5; bfloat16, or another kind of device, to more.

        Args:
          rows: the numbers of views to try at once; None is all.
        """
        views, vectors = self._known["views"], self._known["vectors"]
        apart = 0.0
        for count in self.rows if rows is None else rows:
            # Each view comes first once, and the others in the rows behind it.
            blocks = [np.resize(views[i:], (count, *views.shape[1:])) for i in range(len(views))]
            found = [np.asarray(self._programs[count](self._weights, block))[0] for block in blocks]
            apart = max(apart, float(np.linalg.norm(found - vectors, axis=1).max()))
        return apart


def _blocks(
    views: UInt8[np.ndarray, "n s s 3"], rows: Sequence[int]
) -> Iterator[tuple[int, UInt8[np.ndarray, "m s s 3"]]]:
    """Consecutive views, and the number that each block of them is filled up to: the largest of
    which at least half is needed."""
    begin = 0
    while left := len(views) - begin:
        size = max((n for n in rows if n <= 2 * left), default=min(rows))
        yield size, views[begin : begin + size]
        begin = min(begin + size, len(views))


def platform() -> str:
    """The name that programs are lowered under for what JAX computes on here."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} holds no package: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"{directory} holds no package: {MANIFEST} is one of something else")
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
    """A file of the package, once its digest is the manifest's."""
    path = directory / name
    if name not in files or Path(name).name != name:
        raise UserError(f"{directory / MANIFEST} is damaged: {name!r} is none of its files")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != files[name]["sha256"]:
        raise UserError(f"{path} is not the file {MANIFEST} names (sha256 differs)")
    return content


def _programs(
    directory: Path, names: Mapping[str, str], content: Mapping[str, bytes]
) -> dict[int, Program]:
    """Rows -> what describes that many views at once."""
    found = {}
    for rows, name in names.items():
        program = jax.jit(_program(directory / name, content[name]).call)
        found |= dict.fromkeys(ANY_ROWS if rows == ANY else (int(rows),), program)
    return found


def _program(path: Path, content: bytes) -> export.Exported:
    try:
        return export.deserialize(bytearray(content))
    except ImportError:
        raise UserError("reading a program needs flatbuffers (pip install flatbuffers)") from None
    except Exception as error:  # a digest that fits says nothing of what the bytes are
        raise UserError(f"{path} is no program of jax.export ({type(error).__name__})") from None


def _arrays(path: Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        return load(content)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error})") from None


# ---- command -------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    options.add_argument("images", nargs="*", type=Path, metavar="IMAGE")
    options.add_argument(
        "--package", type=Path, default=Path(), metavar="DIR", help="default: where you stand"
    )
    options.add_argument(
        "--check", action="store_true", help="first say how far vectors are from the run's own"
    )
    chosen = options.parse_args(words)
    try:
        predictor = Predictor.load(chosen.package)
        if chosen.check:
            print(f"at most {predictor.check():.1e} from the run's own vectors", file=sys.stderr)
        for path in chosen.images:
            vector = predictor.describe(_view(predictor, path)[None])[0]
            print(json.dumps({"image": str(path), "vector": vector.tolist()}), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
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
