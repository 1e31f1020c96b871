"""Packages a trained run for a service: a directory that embeds images without training code.

    manifest.json          content of the package, with the digest of every file
    weights.safetensors    the weights that search uses, shared by all programs
    cpu-N.jax              the network for a batch of N views, lowered for the CPU (`jax.export`)
    accelerator.jax        the network for any batch size, lowered for accelerators
    cpu-N.stablehlo        the StableHLO program of cpu-N.jax, for other runtimes
    predictor.onnx         optional: the network in float32 with its weights, as an ONNX model
    check.safetensors      some views and the vectors that the run computes for them
    afa/, requirements.txt `afa.serving.predictor` and its imports

The network is lowered separately for the CPU, because it differs there: convolutions are matrix
products over blocks of a known number of images (`afa.models.cpu_convolution`), and arithmetic is
float32 where accelerators may use bfloat16. Weights are arguments of the programs, so that they are
not stored once per program.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, PyTree
from safetensors.numpy import save

from afa import config as configuration
from afa import parallel
from afa.config import ExperimentConfig
from afa.data.images import resize
from afa.data.types import ImageSet
from afa.errors import UserError
from afa.inference.load import TrainedEmbedder
from afa.io import require_writable, write_bytes, write_json
from afa.models.fusion import Fusion
from afa.models.networks import Networks, build_networks, dtype_of
from afa.serving import onnx_graph
from afa.serving.predictor import (
    ANY,
    ANY_ROWS,
    CHECK,
    FORMAT,
    KIND,
    MANIFEST,
    PROMISE,
    WEIGHTS,
    Predictor,
    platform,
)
from afa.train.steps import to_unit

ONNX = "predictor.onnx"
CPU_ROWS = (1, 4, 16)
# The accelerators' program also runs on the CPU, slowly, so that it can be tested there.
ACCELERATORS = ("cuda", "rocm", "tpu", "cpu")
CODE = (
    "__init__.py", "errors.py", "data/__init__.py", "data/images.py", "data/types.py",
    "serving/__init__.py", "serving/predictor.py",
)  # fmt: skip
LIBRARIES = (
    "flatbuffers", "jax", "jaxtyping", "numpy", "opencv-python-headless", "pillow", "safetensors",
    "simplejpeg",
)  # fmt: skip
CHECKED = 3  # views in check.safetensors
# Largest distance of unit vectors to the run's own: on the CPU, in ONNX, in bfloat16.
ROUNDING, NEAR, COARSE = 1e-5, 1e-4, 0.1

Weights = dict[str, np.ndarray]


class Family(NamedTuple):
    """Programs for one kind of device.

    Attributes:
      platforms: platforms of `jax.export` that they are lowered for.
      precision: dtype of their arithmetic.
      programs: batch size ("any" or a number) -> program.
    """

    platforms: tuple[str, ...]
    precision: str
    programs: dict[str, export.Exported]


def pack(run: Path, out: Path, precision: str | None = None, onnx: bool = False) -> dict[str, Any]:
    """Writes the package of a finished run atomically.

    Args:
      run: directory of the run.
      out: a directory that does not exist or is empty.
      precision: "float32" or "bfloat16" on accelerators; None for the run's `train.precision`. The
        CPU always uses that of the run.
      onnx: whether to write an ONNX model too.

    Returns:
      The manifest, and under "apart" the largest distance of each family's vectors to the run's
      own; None for a family that cannot run here.

    Raises:
      UserError: no finished run, a directory that is not empty or cannot be written, or vectors
        that differ from the run's own.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: is not empty; name a new directory")
    require_writable(out.absolute().parent, "--out")
    embedder = TrainedEmbedder.load(run)
    weights, known = _needed_weights(embedder), _check_data(embedder)
    families = {
        "cpu": _family(embedder, weights, False, None),
        "accelerator": _family(embedder, weights, True, precision),
    }
    with _staged(out) as stage:
        names = _write_programs(stage, families)
        write_bytes(stage / WEIGHTS, save(weights))
        write_bytes(stage / CHECK, save(known))
        _write_code(stage)
        if onnx:
            write_bytes(stage / ONNX, _onnx(embedder, weights))
        dimension = known["vectors"].shape[1]
        manifest = _manifest(embedder, weights, families, names, dimension)
        manifest["files"] = _digests(stage)
        write_json(stage / MANIFEST, manifest)
        distances = {name: _distance(stage, name, family) for name, family in families.items()}
        if onnx:
            distances["onnx"] = _onnx_distance(stage / ONNX, known, families["cpu"])
    return manifest | {"apart": distances}


# ---- programs ------------------------------------------------------------------------------------


def _family(
    embedder: TrainedEmbedder, weights: Weights, accelerator: bool, precision: str | None
) -> Family:
    """Lowers the network for the CPU or for accelerators."""
    with parallel.lowered_for(accelerator):
        config = embedder.config
        if precision is not None:
            config = configuration.with_changes(config, **{"train.precision": precision})
        platforms = ACCELERATORS if accelerator else ("cpu",)
        rows = {ANY: export.symbolic_shape("rows")[0]} if accelerator else _by_name(CPU_ROWS)
        lower = export.export(jax.jit(_network(embedder, config)), platforms=platforms)
        programs = {
            name: lower(_shapes(weights), _views_of(config, count)) for name, count in rows.items()
        }
        return Family(platforms, dtype_of(config.train.precision).name, programs)


def _onnx(embedder: TrainedEmbedder, weights: Weights) -> bytes:
    """Converts the network to ONNX, lowered as for accelerators to keep convolutions."""
    record = embedder.record
    with parallel.lowered_for(True):
        config = configuration.with_changes(embedder.config, **{"train.precision": "float32"})
        embed, arrays = _network(embedder, config), jax.tree.map(jnp.asarray, weights)
        about = {
            "checkpoint": record["checkpoint"],
            "preprocessing": json.dumps(record["preprocessing"]),
        }
        size = config.data.image_size
        return onnx_graph.model(lambda views: embed(arrays, views), size, about)


def network(
    networks: Networks, variables: PyTree, fusion: Fusion
) -> Callable[[Mapping[str, Array], Array], Array]:
    """Returns the function (named weights, uint8 views) -> unit vectors that search uses.

    Args:
      networks: networks of the run.
      variables: all variables, or their shapes. Those that are not among the weights are zero.
      fusion: how a query becomes a vector.
    """

    def embed(weights: Mapping[str, Array], views: Array) -> Array:
        def weight_or_zeros(path: Any, leaf: Any) -> Any:
            # Zeros stand for unused weights; they are removed when the program is lowered.
            weight = weights.get(_name(path))
            return jnp.zeros(leaf.shape, leaf.dtype) if weight is None else weight

        variables = jax.tree.map_with_path(weight_or_zeros, shapes)
        return networks.vectors(variables, to_unit(views), fusion)

    shapes = _shapes(variables)
    return embed


def named(tree: PyTree) -> dict[str, Any]:
    """Returns path -> leaf of a tree."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _needed_weights(embedder: TrainedEmbedder) -> Weights:
    """Returns the weights that the embedding of a query depends on."""
    weights = {name: np.asarray(leaf) for name, leaf in named(embedder.variables).items()}
    with parallel.lowered_for(False):
        lower = export.export(jax.jit(_network(embedder, embedder.config)), platforms=("cpu",))
        kept = lower(_shapes(weights), _views_of(embedder.config, 1)).module_kept_var_idx
    return {name: weights[name] for i, name in enumerate(sorted(weights)) if i in kept}


def _network(embedder: TrainedEmbedder, config: ExperimentConfig) -> Callable:
    manifest = embedder.record
    networks = build_networks(config, manifest["training_classes"])
    return network(networks, embedder.variables, embedder.fusion)


def _name(path: Any) -> str:
    return "/".join(part.key for part in path)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _by_name(rows: tuple[int, ...]) -> dict[str, int]:
    return {str(count): count for count in rows}


def _views_of(config: ExperimentConfig, rows: Any) -> jax.ShapeDtypeStruct:
    size = config.data.image_size
    return jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8)


# ---- check ---------------------------------------------------------------------------------------


def _check_data(embedder: TrainedEmbedder) -> dict[str, np.ndarray]:
    """Returns random views (coloured blobs with noise) and the vectors that the run computes."""
    size = embedder.config.data.image_size
    draw = np.random.default_rng(0)
    blobs = [resize(draw.integers(0, 256, (4, 4, 3), np.uint8), size, size) for _ in range(CHECKED)]
    noisy = blobs + draw.normal(0, 10, (CHECKED, size, size, 3))
    views = np.clip(noisy, 0, 255).astype(np.uint8)
    ids = tuple(map(str, range(CHECKED)))
    images = ImageSet(list(views), np.zeros(CHECKED, np.int64), ids, np.zeros(CHECKED, bool))
    return {"views": views, "vectors": embedder(images)}


def _distance(package: Path, name: str, family: Family) -> float | None:
    """Largest distance of the vectors of a written family to the run's own; None if its programs
    cannot run here.

    Raises:
      UserError: the distance is too large.
    """
    current = platform()
    if current not in family.platforms:
        return None
    # A program for any batch size is checked with one size above 1, where rows could be mixed up.
    rows = ANY_ROWS[1:2] if ANY in family.programs else None
    distance = Predictor.load(package, name).check(rows)
    exact = current == "cpu" and family.precision == "float32"
    if not distance <= (ROUNDING if exact else COARSE):
        raise UserError(f"the programs for {name} are {distance:.1e} from the run's own vectors")
    return distance


def _onnx_distance(model: Path, known: Mapping[str, np.ndarray], family: Family) -> float | None:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (vectors,) = session.run(None, {onnx_graph.INPUT: known["views"]})
    distance = float(np.linalg.norm(vectors - known["vectors"], axis=1).max())
    exact = platform() == "cpu" and family.precision == "float32"
    if not distance <= (NEAR if exact else COARSE):
        raise UserError(f"the ONNX model is {distance:.1e} from the run's own vectors")
    return distance


# ---- files ---------------------------------------------------------------------------------------


def _write_programs(stage: Path, families: Mapping[str, Family]) -> dict[str, dict[str, str]]:
    """Writes all programs; returns family -> batch size -> file."""
    names: dict[str, dict[str, str]] = {}
    for family, (_, _, programs) in families.items():
        for rows, program in programs.items():
            stem = family if rows == ANY else f"{family}-{rows}"
            names.setdefault(family, {})[rows] = f"{stem}.jax"
            write_bytes(stage / f"{stem}.jax", _serialised(program))
            if rows != ANY:
                write_bytes(stage / f"{stem}.stablehlo", program.mlir_module_serialized)
    return names


def _serialised(program: export.Exported) -> bytes:
    try:
        return bytes(program.serialize())
    except ImportError:
        raise UserError("writing a program needs flatbuffers (pip install flatbuffers)") from None


def _write_code(stage: Path) -> None:
    source = Path(__file__).parents[1]
    for name in CODE:
        write_bytes(stage / "afa" / name, (source / name).read_bytes())
    versions = "".join(f"{each}=={importlib.metadata.version(each)}\n" for each in LIBRARIES)
    write_bytes(stage / "requirements.txt", versions.encode())


def _manifest(
    embedder: TrainedEmbedder,
    weights: Weights,
    families: Mapping[str, Family],
    names: Mapping[str, Mapping[str, str]],
    dimension: int,
) -> dict[str, Any]:
    export_manifest = embedder.record
    same = ("experiment", "checkpoint", "step", "preprocessing", "configuration")
    (version,) = {
        program.calling_convention_version
        for family in families.values()
        for program in family.programs.values()
    }
    return {
        "kind": KIND,
        "format": FORMAT,
        "jax": jax.__version__,
        "promise": PROMISE,
        "calling_convention": version,
        **{name: export_manifest[name] for name in same},
        "fusion": export_manifest["fusion"],
        "dimension": dimension,
        "families": {
            name: {
                "platforms": family.platforms,
                "precision": family.precision,
                "programs": names[name],
            }
            for name, family in families.items()
        },
        # Names of the weights in the order of a program's arguments; the views come last.
        "arguments": sorted(weights),
    }


def _digests(stage: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file, by its path within the package."""
    found = {}
    for path in sorted(stage.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            found[path.relative_to(stage).as_posix()] = {"bytes": len(content), "sha256": digest}
    return found


@contextlib.contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """Yields a staging folder that is renamed to `directory` at the end, or removed on an error.

    Raises:
      UserError: the disk is full or not writable.
    """
    directory = directory.resolve()  # `.` has no name
    stage = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")
    try:
        stage.mkdir(parents=True)
        yield stage
        stage.replace(directory)
    except OSError as error:
        raise UserError(
            f"--out={directory}: cannot be written ({error.strerror or error})"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
