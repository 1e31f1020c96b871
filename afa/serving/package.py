"""A trained run packed for a service: one directory that describes images without training code.

    manifest.json          what everything is, with the digest of every file
    weights.safetensors    the parameters that the run's search uses, once for all programs
    cpu-N.jax              the network for N views at once, lowered for the CPU (`jax.export`)
    accelerator.jax        the same for any number of views, for accelerators
    cpu-N.stablehlo        the program inside of cpu-N.jax, for other runtimes of StableHLO
    predictor.onnx         if asked for, the same in float32 with its parameters, as an ONNX model
    check.safetensors      some views and the run's own vectors of them
    afa/, requirements.txt `afa.serving.predictor` and what it imports

A network is lowered twice, because it is another one on the CPU: convolutions are products over
windows, cut into blocks whose number of images has to be known (`afa.models.cpu_convolution`), and
arithmetic is float32 where accelerators may have bfloat16. Parameters are arguments of the
programs: as constants every program would hold all of them once more.
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
from afa.inference.load import Trained
from afa.io import require_writable, write_bytes, write_json
from afa.models.fusion import fuse
from afa.models.networks import Networks, build_networks, dtype_of
from afa.serving import onnx_graph
from afa.serving.predictor import (
    ANY,
    ANY_ROWS,
    CHECK,
    FORMAT,
    KIND,
    MANIFEST,
    WEIGHTS,
    Predictor,
    platform,
)
from afa.train.steps import to_unit

ONNX = "predictor.onnx"
CPU_ROWS = (1, 4, 16)
# An accelerator's program runs on the CPU too, where it is tested; it only is slow there.
ACCELERATORS = ("cuda", "rocm", "tpu", "cpu")
CODE = (
    "__init__.py", "errors.py", "data/__init__.py", "data/images.py", "data/types.py",
    "retrieval/__init__.py", "serving/predictor.py",
)  # fmt: skip
LIBRARIES = (
    "flatbuffers", "jax", "jaxtyping", "numpy", "opencv-python-headless", "pillow", "safetensors",
    "simplejpeg",
)  # fmt: skip
CHECKED = 3  # views of which a package holds vectors
# How far a packed program's unit vectors may be from the run's own: by rounding, and in bfloat16.
ROUNDING, NEAR, COARSE = 1e-5, 1e-4, 0.1

Weights = dict[str, np.ndarray]


class Family(NamedTuple):
    """Programs for one kind of device: rows ("any" or a number) -> program."""

    platforms: tuple[str, ...]
    precision: str
    programs: dict[str, export.Exported]


def pack(run: Path, out: Path, precision: str | None = None, onnx: bool = False) -> dict[str, Any]:
    """Writes the package of a finished run, whole or not at all.

    Args:
      out: a directory that does not exist yet, or is empty.
      precision: "float32" or "bfloat16" for accelerators; None is the run's own rule
        (`train.precision`). The CPU has the run's.
      onnx: whether to write an ONNX model too.

    Returns:
      The manifest, and under "apart" the distance of each family's vectors from the run's own, None
      of what cannot run here.

    Raises:
      UserError: no finished run, a directory that holds something or cannot be written, or vectors
        that differ from the run's own.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: holds something already; name a new directory")
    require_writable(out.absolute().parent, "--out")
    trained = Trained.load(run)
    weights, known = _needed(trained), _known(trained)
    families = {
        "cpu": _family(trained, weights, False, None),
        "accelerator": _family(trained, weights, True, precision),
    }
    with _whole(out) as stage:
        names = _write_programs(stage, families)
        write_bytes(stage / WEIGHTS, save(weights))
        write_bytes(stage / CHECK, save(known))
        _write_code(stage)
        if onnx:
            write_bytes(stage / ONNX, _onnx(trained, weights))
        dimension = known["vectors"].shape[1]
        manifest = _manifest(trained, weights, families, names, dimension)
        manifest["files"] = _digests(stage)
        write_json(stage / MANIFEST, manifest)
        apart = {name: _apart(stage, name, family) for name, family in families.items()}
        if onnx:
            apart["onnx"] = _onnx_apart(stage / ONNX, known, families["cpu"])
    return manifest | {"apart": apart}


# ---- programs ------------------------------------------------------------------------------------


def _family(trained: Trained, weights: Weights, accelerator: bool, precision: str | None) -> Family:
    """The network lowered for the CPU or for accelerators."""
    with parallel.lowered_for(accelerator):
        config = trained.config
        if precision is not None:
            config = configuration.with_changes(config, **{"train.precision": precision})
        platforms = ACCELERATORS if accelerator else ("cpu",)
        rows = {ANY: export.symbolic_shape("rows")[0]} if accelerator else _by_name(CPU_ROWS)
        lower = export.export(jax.jit(_network(trained, config)), platforms=platforms)
        programs = {
            name: lower(_shapes(weights), _views_of(config, count)) for name, count in rows.items()
        }
        return Family(platforms, dtype_of(config.train.precision).name, programs)


def _onnx(trained: Trained, weights: Weights) -> bytes:
    """The network as an ONNX model. Like an accelerator, its runtimes have convolutions."""
    record = trained.record
    with parallel.lowered_for(True):
        config = configuration.with_changes(trained.config, **{"train.precision": "float32"})
        describe, arrays = _network(trained, config), jax.tree.map(jnp.asarray, weights)
        about = {
            "checkpoint": record["checkpoint"],
            "preprocessing": json.dumps(record["preprocessing"]),
        }
        size = config.data.image_size
        return onnx_graph.model(lambda views: describe(arrays, views), size, about)


def network(
    networks: Networks, variables: PyTree, fusion: Mapping[str, float]
) -> Callable[[Mapping[str, Array], Array], Array]:
    """What search computes of a query, as a function of named weights and uint8 views.

    Args:
      variables: all there are, or their shapes. Those that are not among the weights are zero.
      fusion: weight of every block of a fused vector.
    """

    def describe(weights: Mapping[str, Array], views: Array) -> Array:
        def given(path: Any, leaf: Any) -> Any:
            # Of what nothing reads, nothing is left in a program.
            known = weights.get(_name(path))
            return jnp.zeros(leaf.shape, leaf.dtype) if known is None else known

        filled = jax.tree.map_with_path(given, shapes)
        blocks, gates = networks.blocks(filled, to_unit(views), tuple(fusion))
        return fuse(blocks, fusion, gates)

    shapes = _shapes(variables)
    return describe


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _needed(trained: Trained) -> Weights:
    """The weights that the description of a query depends on."""
    weights = {name: np.asarray(leaf) for name, leaf in named(trained.variables).items()}
    with parallel.lowered_for(False):
        lower = export.export(jax.jit(_network(trained, trained.config)), platforms=("cpu",))
        kept = lower(_shapes(weights), _views_of(trained.config, 1)).module_kept_var_idx
    return {name: weights[name] for place, name in enumerate(sorted(weights)) if place in kept}


def _network(trained: Trained, config: ExperimentConfig) -> Callable:
    manifest = trained.record
    networks = build_networks(config, manifest["training_classes"])
    return network(networks, trained.variables, manifest["weights"])


def _name(path: Any) -> str:
    return "/".join(part.key for part in path)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _by_name(rows: tuple[int, ...]) -> dict[str, int]:
    return {str(count): count for count in rows}


def _views_of(config: ExperimentConfig, rows: Any) -> jax.ShapeDtypeStruct:
    size = config.data.image_size
    return jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8)


# ---- proof ---------------------------------------------------------------------------------------


def _known(trained: Trained) -> dict[str, np.ndarray]:
    """Views that anyone may see, blobs of colour under noise, and the run's own vectors of them."""
    size = trained.config.data.image_size
    draw = np.random.default_rng(0)
    blobs = [resize(draw.integers(0, 256, (4, 4, 3), np.uint8), size, size) for _ in range(CHECKED)]
    noisy = blobs + draw.normal(0, 10, (CHECKED, size, size, 3))
    views = np.clip(noisy, 0, 255).astype(np.uint8)
    ids = tuple(map(str, range(CHECKED)))
    images = ImageSet(list(views), np.zeros(CHECKED, np.int64), ids, np.zeros(CHECKED, bool))
    return {"views": views, "vectors": trained(images)}


def _apart(package: Path, name: str, family: Family) -> float | None:
    """How far the vectors of a written family are from the run's own; None where its programs
    cannot run here.

    Raises:
      UserError: too far.
    """
    here = platform()
    if here not in family.platforms:
        return None
    # Of a program for any number one is tried, and not the one where rows cannot be mixed up.
    rows = ANY_ROWS[1:2] if ANY in family.programs else None
    apart = Predictor.load(package, name).check(rows)
    exact = here == "cpu" and family.precision == "float32"
    if not apart <= (ROUNDING if exact else COARSE):
        raise UserError(f"the programs for {name} are {apart:.1e} from the run's own vectors")
    return apart


def _onnx_apart(model: Path, known: Mapping[str, np.ndarray], family: Family) -> float | None:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (vectors,) = session.run(None, {onnx_graph.INPUT: known["views"]})
    apart = float(np.linalg.norm(vectors - known["vectors"], axis=1).max())
    exact = platform() == "cpu" and family.precision == "float32"
    if not apart <= (NEAR if exact else COARSE):
        raise UserError(f"the ONNX model is {apart:.1e} from the run's own vectors")
    return apart


# ---- files ---------------------------------------------------------------------------------------


def _write_programs(stage: Path, families: Mapping[str, Family]) -> dict[str, dict[str, str]]:
    """Family -> rows -> file."""
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
    trained: Trained,
    weights: Weights,
    families: Mapping[str, Family],
    names: Mapping[str, Mapping[str, str]],
    dimension: int,
) -> dict[str, Any]:
    export_manifest = trained.record
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
        "calling_convention": version,
        **{name: export_manifest[name] for name in same},
        "fusion": export_manifest["weights"],
        "dimension": dimension,
        "families": {
            name: {
                "platforms": family.platforms,
                "precision": family.precision,
                "programs": names[name],
            }
            for name, family in families.items()
        },
        # In the order of a program's arguments; the views come last.
        "arguments": sorted(weights),
    }


def _digests(stage: Path) -> dict[str, dict[str, Any]]:
    """Every file, by its path inside of the package."""
    found = {}
    for path in sorted(stage.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            found[path.relative_to(stage).as_posix()] = {"bytes": len(content), "sha256": digest}
    return found


@contextlib.contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A folder to write in that becomes `directory` at the end, or is gone after an error.

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
