"""A minimal complete run, started by the real command line, for tests of the main job.

In this process: `main(*words(...))`. In a new process, which can be killed: `start(*words(...))`.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import ROOT

from afa.data.images import encode_jpeg
from afa.io import locked
from afa.models import backbones
from afa.models.backbones.contract import Member
from afa.models.backbones.resnet import ResNet

CLASSES, IMAGES, SIDE = 12, 4, 40
TRAINING_CLASSES = 4  # half of the classes, less two for validation

# A network that compiles in seconds.
TINY = Member(
    lambda options: ResNet("basic", (1, 1), options, 8), "nowhere", stems=("imagenet", "small")
)
backbones.MEMBERS["tiny"] = TINY
backbones.FAMILIES["resnet"]["tiny"] = TINY

SETTINGS = {
    "exp": "debug",
    "data.name": "folder",
    "data.image_size": 16,
    "data.batch_size": 8,
    "data.images_per_class": 2,
    "data.validation_fraction": 0.34,
    "backbone.name": "tiny",
    "embedder.embedding_dim": 12,
    "embedder.local_dim": 6,
    "generator.width": 4,
    "generator.levels": 2,
    "generator.latent_dim": 5,
    "discriminator.width": 4,
    "discriminator.levels": 2,
    "train.steps": "8",
    "train.plain": "4",
    "train.generator_steps": "4",
    "train.log_every": "3",
    "train.evaluate_every": "4",
    "train.checkpoint_every": "2",
    "train.keep_best": 1,
    "optim.warmup": "0",
    "evaluation.batch_size": 16,
    "evaluation.views": ("flip",),
    "evaluation.severities": (3,),
    "evaluation.corruption_queries": 8,
    "retrieval.results": 5,
}
STEPS = 12  # 4 of F, 4 of F with perturbed features, 4 of G and D


def images(root: Path, classes: int = CLASSES, count: int = IMAGES, seed: int = 0) -> Path:
    """Writes folders train, test and iconic with class folders. Images are noisy stripes whose
    colours and direction depend on the class; one clean catalogue image per class."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    for label in range(classes):
        tones = np.random.default_rng(label).integers(20, 236, (2, 3))
        angle = np.pi * label / classes
        stripes = np.sin((np.cos(angle) * x + np.sin(angle) * y) / 2) > 0
        clean = np.where(stripes[..., None], *tones)
        for part, number, noise in (("train", count, 25), ("test", count, 25), ("iconic", 1, 0)):
            folder = root / part / f"class_{label:02d}"
            folder.mkdir(parents=True)
            for i in range(number):
                noisy = np.roll(clean, rng.integers(SIDE), 1) + rng.normal(0, noise, clean.shape)
                pixels = np.clip(noisy, 0, 255).astype(np.uint8)
                (folder / f"img_{i}.jpg").write_bytes(encode_jpeg(pixels))
    return root


def words(data: Path | str, workdir: Path | str, **changes: Any) -> list[str]:
    """Returns the command line of a tiny run; dotted fields may be changed, or omitted by None."""
    settings = SETTINGS | {"data.path": str(data), "workdir": str(workdir)} | changes
    line = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, tuple):
            line += [f"--{name}", *map(str, value)]
        else:
            line.append(f"--{name}={value}")
    return line


def main(*line: str) -> int:
    """Runs the command in this process; returns its exit code."""
    import jax

    from experiments import run

    # Runs are too short to profit from compiler optimisations.
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        return run.main(list(line))
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def start(*line: str, **environment: str) -> "subprocess.Popen[str]":
    """Starts the command in a new process, with the compilation cache of this one.

    Environment variable END: with "step:N:SIGNAL" the process sends itself a signal right after
    step N, with "save:N:SIGNAL" while the checkpoint of step N is written in the background.
    """
    import jax

    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    cache = str(jax.config.jax_compilation_cache_dir)  # pyright: ignore[reportAttributeAccessIssue]
    fixed = {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
    fixed["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    return subprocess.Popen(
        [sys.executable, __file__, *line], env={**os.environ, **fixed, **environment}, cwd=ROOT,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Waits for a process; returns exit code, standard output and standard error."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def ending(when: str) -> None:
    """Makes this process send itself a signal (see END in `start`)."""
    from afa import parallel
    from afa.train.checkpoint import Checkpoints

    kind, step, name = when.split(":")
    number = signal.Signals[name]
    if kind == "step":
        original = parallel.preempted

        def preempted(done: int, signalled: bool) -> bool:
            if done == int(step):
                os.kill(os.getpid(), number)
            return original(done, signalled)

        parallel.preempted = preempted
        return
    saved = Checkpoints.save

    def save(self: Checkpoints, state: Any, position: Any, config: Any, metrics: Any) -> None:
        saved(self, state, position, config, metrics)
        if position.batch == int(step):
            os.kill(os.getpid(), number)

    Checkpoints.save = save


def listing(root: Path) -> Mapping[str, int]:
    """Returns every file and folder below a directory with its modification time; equal if nothing
    has changed."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*")}


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Returns metrics.jsonl without times."""
    timed = ("time", "images_per_second")
    entries = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if k not in timed} for entry in entries]


def result(workdir: Path) -> dict[str, Any]:
    """Returns result.json."""
    return json.loads((workdir / "result.json").read_text())


def figures(workdir: Path) -> dict[str, Any]:
    """Returns the metrics of result.json without times."""
    metrics = result(workdir)["metrics"]
    search = {k: v for k, v in metrics["search"].items() if "second" not in k}
    return metrics | {"search": search}


def digest(workdir: Path, step: int = STEPS) -> str:
    """Returns a digest of a checkpoint: parameters, statistics, optimisers, averages."""
    import jax

    from afa.inference.load import restore
    from afa.workdir import Workdir

    home = Workdir(workdir)
    stored = home.stored()
    assert stored is not None
    state = restore(home, stored[1], TRAINING_CLASSES, step)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def once(folder: Path) -> Iterator[bool]:
    """Yields whether this test process has to create `folder`; waits for another that does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(folder.name + ".done")
    with locked(folder.with_name(folder.name + ".lock")):
        yield not done.exists()
        done.touch()


def shared(factory: pytest.TempPathFactory) -> Path:
    """Returns a folder shared by all processes of one test run."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def finished(data: Path, factory: pytest.TempPathFactory) -> Path:
    """Returns a finished run, created once for all test processes; its stdout is in FOLDER.out."""
    folder = shared(factory) / "tiny_finished"
    with once(folder) as first:
        if first:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                assert main(*words(data, folder)) == 0
            folder.with_suffix(".out").write_text(output.getvalue())
    return folder


def slow_down(seconds: float) -> None:
    """Makes every training step take longer: several processes agree about a signal within
    seconds."""
    from afa import parallel

    original = parallel.preempted

    def preempted(done: int, signalled: bool) -> bool:
        time.sleep(seconds)
        return original(done, signalled)

    parallel.preempted = preempted


def on_tpu_vm() -> None:
    """Lets JAX look for the other processes as on a TPU VM."""
    from jax._src.clusters import cloud_tpu_cluster

    cloud_tpu_cluster.running_in_cloud_tpu_vm = True  # pyright: ignore
    if "GCE_METADATA_IP" in os.environ:
        os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it on a machine without TPUs


if __name__ == "__main__":
    if "FAKE_TPU_VM" in os.environ:
        on_tpu_vm()
    if "PAUSE" in os.environ:
        slow_down(float(os.environ["PAUSE"]))
    if "END" in os.environ:
        ending(os.environ["END"])
    sys.exit(main(*sys.argv[1:]))
