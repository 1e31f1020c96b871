"""The smallest complete run, through the real command line, for tests of the whole job.

In this process: `main(*words(...))`. In one of its own, to be killed: `start(*words(...))`.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
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

CLASSES, PICTURES, SIDE = 12, 4, 40
TRAINING_CLASSES = 4  # of the half that trains two validate

# A network that compiles in seconds, where users have resnet18 and larger.
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
    "train.keep_best": "1",
    "optim.warmup": "0",
    "evaluation.batch_size": 16,
    "evaluation.views": ("flip",),
    "evaluation.severities": (3,),
    "evaluation.corruption_queries": 8,
    "retrieval.results": 5,
}
STEPS = 12  # 4 of F, 4 with pushed features, 4 of G and D


def images(root: Path, classes: int = CLASSES, count: int = PICTURES, seed: int = 0) -> Path:
    """Folders train, test and iconic of class folders: stripes whose colours and direction are the
    class's, under noise; one clean catalogue image a class."""
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
    """The command line of a tiny run; dotted fields may be changed, or left out with None."""
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
    """The command in this process; its exit code."""
    import jax

    from experiments import run

    # Nothing here runs long enough to repay the compiler's optimisations.
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        return run.main(list(line))
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def start(*line: str, **environment: str) -> "subprocess.Popen[str]":
    """The command in a process of its own, with the compilation cache of this one.

    Environment variables that decide where it ends:
      END: "step:N:SIGNAL" sends itself a signal between step N and what is done after it,
        "save:N:SIGNAL" while the checkpoint of step N is being written in the background.
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
    """Exit code, standard output and standard error of a process, once it is over."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def ending(where: str) -> None:
    """Makes this process send itself a signal at a place (see `start`)."""
    from afa import parallel
    from afa.train.checkpoint import Checkpoints

    kind, step, name = where.split(":")
    number = signal.Signals[name]
    if kind == "step":
        asked = parallel.preempted

        def preempted(done: int, signalled: bool) -> bool:
            if done == int(step):
                os.kill(os.getpid(), number)
            return asked(done, signalled)

        parallel.preempted = preempted
        return
    saved = Checkpoints.save

    def save(self: Checkpoints, state: Any, position: Any, config: Any, metrics: Any) -> None:
        saved(self, state, position, config, metrics)
        if position.batch == int(step):
            os.kill(os.getpid(), number)

    Checkpoints.save = save


def listing(root: Path) -> Mapping[str, int]:
    """Every file and folder below a directory with its time of change: equal when nothing was
    touched."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*")}


def lines(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    timed = ("time", "images_per_second")
    entries = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if k not in timed} for entry in entries]


def result(workdir: Path) -> dict[str, Any]:
    """result.json."""
    return json.loads((workdir / "result.json").read_text())


def figures(workdir: Path) -> dict[str, Any]:
    """The metrics of result.json that do not depend on the clock."""
    metrics = result(workdir)["metrics"]
    search = {k: v for k, v in metrics["search"].items() if "second" not in k}
    return metrics | {"search": search}


def digest(workdir: Path, step: int = STEPS) -> str:
    """Digest of every value of a checkpoint: parameters, statistics, optimisers, averages."""
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
    """Whether this test process is to make `folder`; another one that is at it is waited for."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(folder.name + ".done")
    with locked(folder.with_name(folder.name + ".lock")):
        yield not done.exists()
        done.touch()


def shared(factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of one test run share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def finished(data: Path, factory: pytest.TempPathFactory) -> Path:
    """A finished run, made once for all test processes; its standard output lies beside it."""
    folder = shared(factory) / "tiny_finished"
    with once(folder) as mine:
        if mine:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                assert main(*words(data, folder)) == 0
            folder.with_suffix(".out").write_text(said.getvalue())
    return folder


if __name__ == "__main__":
    if "END" in os.environ:
        ending(os.environ["END"])
    sys.exit(main(*sys.argv[1:]))
