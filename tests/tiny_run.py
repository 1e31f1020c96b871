"""The smallest complete run, through the real command line, for tests of the whole job.

In this process: `main(*words(...))`. In one of its own, to be killed: `start(*words(...))`.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from afa.data.images import encode_jpeg
from afa.models import backbones
from afa.models.backbones.resnet import ResNet

ROOT = Path(__file__).resolve().parent.parent
CLASSES, PICTURES, SIDE = 12, 4, 40

# A network that compiles in seconds, where users have resnet18 and larger.
TINY = SimpleNamespace(
    DEPTHS={"tiny": None},
    build=lambda name, stem, dtype: ResNet("basic", (1, 1), stem, 8, dtype),
)
backbones.FAMILIES["tiny"] = TINY  # pyright: ignore[reportArgumentType]

SETTINGS = {
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


def pictures(root: Path, classes: int = CLASSES, count: int = PICTURES, seed: int = 0) -> Path:
    """Folders train, test and iconic of class folders: stripes whose colours and direction are the
    class's, under noise; one clean catalogue picture a class."""
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
    """The command line of a tiny run; dotted fields may be changed."""
    settings = SETTINGS | {"data.path": str(data), "workdir": str(workdir)} | changes
    line = ["--exp=debug"]
    for name, value in settings.items():
        if isinstance(value, tuple):
            line += [f"--{name}", *map(str, value)]
        else:
            line.append(f"--{name}={value}")
    return line


def main(*line: str) -> int:
    """The command in this process; its exit code."""
    from experiments import run

    return run.main(list(line))


def start(*line: str, **options: Any) -> "subprocess.Popen[str]":
    """The command in a process of its own, with the compilation cache of this one."""
    import jax

    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")))
    )
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)  # pyright: ignore
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["PYTHONUNBUFFERED"] = "1"
    return subprocess.Popen(
        [sys.executable, __file__, *line], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def listing(root: Path) -> Mapping[str, int]:
    """Every file under a directory with its time of change: equal when nothing was touched."""
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns
        for path in root.rglob("*")
        if path.is_file()
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
