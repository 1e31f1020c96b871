"""Image sets -> descriptors, on all devices."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float32, PyTree, UInt8

from afa import parallel
from afa.config import ExperimentConfig
from afa.data.pipeline import Corruption, eval_batches
from afa.data.types import ImageSet
from afa.models import layers
from afa.models.embedder import Players, named
from afa.models.fusion import fuse
from afa.train.steps import to_unit

PIXEL_SIDE = 16  # raw-pixel descriptors: pictures of this side
Corruptions = Corruption | Sequence[Corruption] | None  # of all pictures, of each, of none


@dataclass(frozen=True)
class Described:
    """Descriptor blocks of some pictures, block -> (n, d) unit rows, and gates, block -> (n,)."""

    blocks: dict[str, Float32[np.ndarray, "n _"]]
    gates: dict[str, Float32[np.ndarray, "n"]]

    def fused(self, weights: Mapping[str, float]) -> Float32[np.ndarray, "n d"]:
        """One unit vector a picture (`afa.models.fusion.fuse`)."""
        return np.asarray(_fuse(self.blocks, weights, self.gates))

    def rows(self, index: np.ndarray) -> "Described":
        """The pictures at `index`."""
        return Described(*jax.tree.map(lambda x: x[index], (self.blocks, self.gates)))


@functools.partial(jax.jit, static_argnames="names")
def _fuse_named(blocks: PyTree, weights: PyTree, gates: PyTree, names: tuple[str, ...]) -> Array:
    return fuse(blocks, {name: weights[name] for name in names}, gates)


def _fuse(blocks: PyTree, weights: Mapping[str, float], gates: PyTree) -> Array:
    # The weights are traced: choosing them tries many values with one compiled function.
    names = tuple(weights)
    return _fuse_named(
        {name: blocks[name] for name in names},
        {name: np.float32(weight) for name, weight in weights.items()},
        {name: gate for name, gate in gates.items() if name in names},
        names,
    )


class Embedding:
    """The predict functions of a run; each compiles once.

    `variables` is what `TrainState.search_variables` returns.
    """

    def __init__(self, players: Players, config: ExperimentConfig) -> None:
        self.players, self.config = players, config

        def all_blocks(variables: PyTree, images: Array) -> PyTree:
            return players.blocks(variables, to_unit(images))

        def plain(variables: PyTree, images: Array) -> PyTree:
            descriptors = layers.apply(
                players.embedder, variables["embedder"], to_unit(images), train=False
            )
            return named(descriptors)

        def restore(variables: PyTree, images: Array) -> tuple[Array, Array]:
            return to_unit(images), players.restore(variables, to_unit(images))

        self._blocks = parallel.map_rows(all_blocks)
        self._plain = parallel.map_rows(plain)
        self._restore = parallel.map_rows(restore)
        self._fused: dict[tuple[tuple[str, float], ...], Callable] = {}

    def blocks(
        self, variables: PyTree, images: ImageSet, corruption: Corruptions = None
    ) -> Described:
        """Every block of every picture."""
        blocks, gates = self._over(self._blocks, variables, images, corruption)
        return Described(blocks, gates)

    def plain(
        self, variables: PyTree, images: ImageSet, corruption: Corruptions = None
    ) -> Described:
        """The blocks that need one pass through F: global, local, and both fused."""
        return Described(self._over(self._plain, variables, images, corruption), {})

    def restored(
        self, variables: PyTree, images: ImageSet, corruption: Corruptions = None
    ) -> tuple[Float32[np.ndarray, "n h w 3"], Float32[np.ndarray, "n h w 3"]]:
        """The pictures as they are seen, and G's, in [0, 1]."""
        return self._over(self._restore, variables, images, corruption)

    def fused(self, weights: Mapping[str, float]) -> Callable[..., Float32[np.ndarray, "n d"]]:
        """The function that search uses, of variables, pictures and a corruption: only the blocks
        that have a weight are computed, and each choice of weights compiles once."""
        key = tuple(weights.items())
        if key not in self._fused:

            def embed(variables: PyTree, images: Array) -> Array:
                blocks, gates = self.players.blocks(variables, to_unit(images), tuple(weights))
                return fuse(blocks, weights, gates)

            self._fused[key] = parallel.map_rows(embed)
        mapped = self._fused[key]
        return lambda variables, images, corruption=None: self._over(
            mapped, variables, images, corruption
        )

    def _over(
        self, function: Callable, variables: PyTree, images: ImageSet, corruption: Corruptions
    ) -> PyTree:
        """A mapped function over all pictures, in batches of one shape."""
        size = self.config.evaluation.batch_size
        outputs = []
        for batch in eval_batches(images, self.config.data, size, corruption, self.config.seed):
            padding = np.repeat(batch[-1:], size - len(batch), axis=0)
            out = function(variables, np.concatenate([batch, padding]))
            outputs.append(jax.tree.map(functools.partial(_first, len(batch)), out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def _first(count: int, rows: np.ndarray) -> np.ndarray:
    return rows[:count]


def pixels(images: ImageSet, config: ExperimentConfig, corruption: Corruptions = None) -> Described:
    """Raw pixels as descriptors: 16 x 16 RGB, mean removed, unit length."""

    def rows() -> Iterator[np.ndarray]:
        size = config.evaluation.batch_size
        for batch in eval_batches(images, config.data, size, corruption, config.seed):
            yield _shrunk(batch)

    flat = np.concatenate(list(rows()))
    flat = flat - flat.mean(axis=1, keepdims=True)
    norms = np.sqrt(np.sum(flat * flat, axis=1, keepdims=True) + 1e-6)
    unit = np.where(norms > 1e-2, flat / norms, 1 / np.sqrt(flat.shape[1]))
    return Described({"pixels": unit.astype(np.float32)}, {})


def _shrunk(batch: UInt8[np.ndarray, "b s s 3"]) -> Float32[np.ndarray, "b p"]:
    import cv2

    side = (PIXEL_SIDE, PIXEL_SIDE)
    small = [cv2.resize(each, side, interpolation=cv2.INTER_AREA) for each in batch]
    return np.stack(small).reshape(len(batch), -1).astype(np.float32) / 255
