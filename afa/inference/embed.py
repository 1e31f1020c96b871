"""Computes descriptors of image sets on all devices."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int64, PyTree, UInt8

from afa import parallel
from afa.config import DataConfig, EvaluationConfig
from afa.data.pipeline import Corruption, eval_batches
from afa.data.types import ImageSet
from afa.errors import UserError
from afa.models import backbones, layers
from afa.models.embedder import named
from afa.models.fusion import Fusion, Role, Route, fuse
from afa.models.heads import LocalFeatures
from afa.models.networks import Networks
from afa.train.steps import to_unit

PIXEL_SIDE = 16  # side of the images behind raw-pixel descriptors
ONE_SIZE = ("restored", "discriminator")  # blocks of networks with a fixed input size
Corruptions = Corruption | Sequence[Corruption] | None  # one for all images, one each, or none


@dataclass(frozen=True)
class DescriptorBlocks:
    """Descriptor blocks of n images.

    Attributes:
      blocks: block -> (n, d) unit vectors.
      candidates: view -> its blocks "global", "local" and "posterior", for routes; may be empty.
      scores: judge -> view -> (n,) scores, for routes; may be empty.
    """

    blocks: dict[str, Float32[np.ndarray, "n _"]]
    candidates: dict[str, dict[str, Float32[np.ndarray, "n _"]]] = field(default_factory=dict)
    scores: dict[str, dict[str, Float32[np.ndarray, "n"]]] = field(default_factory=dict)

    def fused(self, fusion: Fusion, role: Role = "query") -> Float32[np.ndarray, "n d"]:
        """Fuses the blocks into one unit vector per image, as `Networks.vectors` does."""
        blocks = self.blocks
        if fusion.route is not None and role == "query":
            blocks = blocks | self._routed(fusion.route)
        return np.asarray(_fuse(blocks, fusion))

    def _routed(self, route: Route) -> dict[str, Float32[np.ndarray, "n _"]]:
        """The blocks of the view that the route chooses for each image."""
        index = self.chosen(route)
        views = [self.candidates[view] for view in route.views]
        return {name: np.stack([view[name] for view in views])[index, np.arange(len(index))]
                for name in views[0]}  # fmt: skip

    def chosen(self, route: Route) -> Int64[np.ndarray, "n"]:
        """Index among the views of the route of the one that is chosen for each image."""
        if len(route.offsets) == 1:
            return np.zeros(len(next(iter(self.blocks.values()))), np.int64)
        scores = self.scores[route.judge]
        totals = [scores[view] + np.float32(offset) for view, offset in route.offsets]
        return np.argmax(np.stack(totals), axis=0)

    def rows(self, index: np.ndarray) -> "DescriptorBlocks":
        """The images at `index`."""
        parts = (self.blocks, self.candidates, self.scores)
        return DescriptorBlocks(*jax.tree.map(lambda x: x[index], parts))


@dataclass(frozen=True)
class Pyramid:
    """Descriptor blocks of images at several scales.

    Attributes:
      scales: scale -> blocks of F.
      rest: blocks of G and D (`ONE_SIZE`), at the image size of training.
    """

    scales: dict[float, DescriptorBlocks]
    rest: DescriptorBlocks

    def fused(
        self,
        fusion: Fusion,
        scales: Sequence[float],
        power: float = 1.0,
    ) -> Float32[np.ndarray, "n d"]:
        """Fuses the blocks into one unit vector per image; each block is averaged over scales.

        Args:
          fusion: weights of the blocks; queries are not routed.
          scales: scales to average, a subset of `self.scales`.
          power: exponent p of a generalised mean with signed powers, sign(x) |x|^p (Radenović et
            al. 2019 use it for positive descriptors); 1 is the arithmetic mean.
        """
        names = self.scales[scales[0]].blocks
        blocks = {
            name: _mean([self.scales[each].blocks[name] for each in scales], power)
            for name in names
        }
        return DescriptorBlocks(blocks | self.rest.blocks).fused(fusion, "gallery")


def _mean(blocks: Sequence[Float32[np.ndarray, "n d"]], power: float) -> Float32[np.ndarray, "n d"]:
    if len(blocks) == 1:
        return blocks[0]
    if power != 1:
        blocks = [_signed_power(block, power) for block in blocks]
    mean = np.mean(blocks, axis=0)
    mean = mean if power == 1 else _signed_power(mean, 1 / power)
    return np.asarray(layers.l2_normalise(jnp.asarray(mean)))


def _signed_power(x: Float32[np.ndarray, "n d"], power: float) -> Float32[np.ndarray, "n d"]:
    return np.sign(x) * np.abs(x) ** np.float32(power)


@functools.partial(jax.jit, static_argnames="names")
def _fuse_named(blocks: PyTree, weights: PyTree, names: tuple[str, ...]) -> Array:
    return fuse(blocks, {name: weights[name] for name in names})


def _fuse(blocks: PyTree, fusion: Fusion) -> Array:
    # Weights are traced, so that trying many weights needs one compilation.
    weights = {name: np.float32(weight) for name, weight in fusion.weights}
    return _fuse_named({name: blocks[name] for name in fusion.blocks}, weights, fusion.blocks)


class Embedding:
    """Predict functions of the networks of a run; each is compiled once.

    `variables` in all methods is the result of `TrainState.search_variables`.

    Args:
      networks: networks of the run.
      backbone: its name, for the image sizes that it accepts.
      data: how images are read; their size.
      evaluation: batch size, and the seed of corruptions.
    """

    def __init__(
        self, networks: Networks, backbone: str, data: DataConfig, evaluation: EvaluationConfig
    ) -> None:
        self.networks, self.backbone = networks, backbone
        self.data, self.evaluation = data, evaluation

        def all_blocks(variables: PyTree, images: Array) -> PyTree:
            return networks.everything(variables, to_unit(images))

        def plain(variables: PyTree, images: Array) -> PyTree:
            return named(
                layers.apply(networks.embedder, variables["embedder"], to_unit(images), train=False)
            )

        def restore(variables: PyTree, images: Array) -> tuple[Array, Array]:
            x = networks.space.of(networks.embedder, variables["embedder"], to_unit(images))
            return x, networks.restore(variables, to_unit(images))

        self._blocks = parallel.map_rows(all_blocks)
        self._plain = parallel.map_rows(plain)
        self._restore = parallel.map_rows(restore)
        self._fused: dict[tuple[Fusion, Role], Callable] = {}
        self._some: dict[tuple[str, ...], Callable] = {}
        self._pooled: dict[tuple[str, ...], Callable] = {}
        self._local_features: dict[int, Callable] = {}
        self._scaled: dict[int, Embedding] = {data.image_size: self}

    def at(self, scale: float) -> "Embedding":
        """Returns the embedding with the same networks at another image scale.

        Raises:
          UserError: a scale that is not above 0.
        """
        side = scaled_side(self.backbone, self.data.image_size, scale)
        if side not in self._scaled:
            data = dataclasses.replace(self.data, image_size=side)
            self._scaled[side] = Embedding(self.networks, self.backbone, data, self.evaluation)
        return self._scaled[side]

    def blocks(
        self, variables: PyTree, images: ImageSet, corruption: Corruptions = None
    ) -> DescriptorBlocks:
        """Computes all blocks of every image, and those of the views for routes."""
        return DescriptorBlocks(*self._over(self._blocks, variables, images, corruption))

    def plain(
        self, variables: PyTree, images: ImageSet, corruption: Corruptions = None
    ) -> DescriptorBlocks:
        """Computes the blocks of one forward pass of F: global, local, and both fused."""
        return DescriptorBlocks(self._over(self._plain, variables, images, corruption))

    def pooled(
        self,
        variables: PyTree,
        images: ImageSet,
        wanted: tuple[str, ...],
        corruption: Corruptions = None,
    ) -> DescriptorBlocks:
        """Computes blocks of the backbone without its heads (`Networks.pooled`)."""
        if wanted not in self._pooled:

            def embed(variables: PyTree, images: Array) -> PyTree:
                return self.networks.pooled(variables, to_unit(images), wanted)

            self._pooled[wanted] = parallel.map_rows(embed)
        return DescriptorBlocks(self._over(self._pooled[wanted], variables, images, corruption))

    def restored(
        self, variables: PyTree, images: ImageSet, corruption: Corruptions = None
    ) -> tuple[Float32[np.ndarray, "n h w c"], Float32[np.ndarray, "n h w c"]]:
        """Returns the images and what G restores of them: images in [0, 1], or mid maps of F."""
        return self._over(self._restore, variables, images, corruption)

    def fused(
        self, fusion: Fusion, role: Role = "query"
    ) -> Callable[..., Float32[np.ndarray, "n d"]]:
        """Returns the function (variables, images, corruption=None) -> fused unit vectors.

        This is the function that search uses. Only blocks with a weight are computed; each fusion
        is compiled once.
        """
        key = fusion, role if fusion.route is not None else "query"
        if key not in self._fused:

            def embed(variables: PyTree, images: Array) -> Array:
                return self.networks.vectors(variables, to_unit(images), *key)

            self._fused[key] = parallel.map_rows(embed)
        mapped = self._fused[key]
        return lambda variables, images, corruption=None: self._over(
            mapped, variables, images, corruption
        )

    def in_both_roles(
        self, fusion: Fusion
    ) -> Callable[..., tuple[Float32[np.ndarray, "n d"], Float32[np.ndarray, "n d"]]]:
        """As `fused`, but returns the vectors of the images as queries and as gallery."""

        def embed(variables: PyTree, images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
            as_query = self.fused(fusion)(variables, images)
            if fusion.route is None:
                return as_query, as_query
            return as_query, self.fused(fusion, "gallery")(variables, images)

        return embed

    def multi_scale(
        self, fusion: Fusion, scales: Sequence[float], power: float = 1.0
    ) -> Callable[..., Float32[np.ndarray, "n d"]]:
        """As `fused`, with images at several scales (`Pyramid.fused`)."""

        def embed(
            variables: PyTree, images: ImageSet, corruption: Corruptions = None
        ) -> Float32[np.ndarray, "n d"]:
            pyramid = self.pyramid(variables, images, fusion.blocks, scales, corruption)
            return pyramid.fused(fusion, scales, power)

        return embed

    def pyramid(
        self,
        variables: PyTree,
        images: ImageSet,
        wanted: Collection[str],
        scales: Sequence[float],
        corruption: Corruptions = None,
    ) -> Pyramid:
        """Computes the wanted blocks of every image; those of F at every scale."""
        scaled = tuple(name for name in wanted if name not in ONE_SIZE)
        fixed = tuple(name for name in wanted if name in ONE_SIZE)
        found = {each: self.at(each).some(variables, images, scaled, corruption) for each in scales}
        return Pyramid(found, self.some(variables, images, fixed, corruption))

    def some(
        self,
        variables: PyTree,
        images: ImageSet,
        wanted: tuple[str, ...],
        corruption: Corruptions = None,
    ) -> DescriptorBlocks:
        """Computes the wanted blocks."""
        if not wanted:
            return DescriptorBlocks({})
        if wanted not in self._some:

            def embed(variables: PyTree, images: Array) -> PyTree:
                blocks = self.networks.blocks(variables, to_unit(images), wanted)
                return {name: blocks[name] for name in wanted}

            self._some[wanted] = parallel.map_rows(embed)
        return DescriptorBlocks(self._over(self._some[wanted], variables, images, corruption))

    def local_features(self, variables: PyTree, images: ImageSet, count: int) -> LocalFeatures:
        """Computes the `count` strongest local features of every image, or all if there are fewer.

        Every leaf of the result has the images along its first axis.
        """
        if count not in self._local_features:

            def strongest(variables: PyTree, images: Array) -> LocalFeatures:
                return self.networks.local_features(variables, to_unit(images), count)

            self._local_features[count] = parallel.map_rows(strongest)
        return self._over(self._local_features[count], variables, images, None)

    def _over(
        self, function: Callable, variables: PyTree, images: ImageSet, corruption: Corruptions
    ) -> PyTree:
        """Applies a mapped function to all images, in batches of one shape, shared among
        processes."""
        size, mine = self.evaluation.batch_size, parallel.share(len(images))
        part = (
            images if mine == slice(0, len(images)) else images.subset(np.arange(len(images))[mine])
        )
        if corruption is not None and not isinstance(corruption, tuple):
            corruption = corruption[mine]
        outputs = []
        seed = self.evaluation.corruption_seed
        for batch in eval_batches(part, self.data, size, corruption, seed):
            padding = np.repeat(batch[-1:], size - len(batch), axis=0)
            out = function(variables, np.concatenate([batch, padding]))
            outputs.append(jax.tree.map(functools.partial(_first, len(batch)), out))
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)
        return parallel.gather_shares(joined, len(images))


def scaled_side(backbone: str, size: int, scale: float) -> int:
    """Side of the images at a scale, in pixels: the nearest side that the backbone accepts.

    Args:
      backbone: its name.
      size: side at scale 1, in pixels.

    Raises:
      UserError: a scale that is not above 0.
    """
    if not 0 < scale < float("inf"):
        raise UserError(f"scale={scale} must be above 0")
    member = backbones.member(backbone)
    step = member.multiple
    least = -(-member.smallest // step) * step
    return max(least, step * round(scale * size / step))


def _first(count: int, rows: np.ndarray) -> np.ndarray:
    return rows[:count]


def pixels(
    images: ImageSet,
    data: DataConfig,
    evaluation: EvaluationConfig,
    corruption: Corruptions = None,
) -> DescriptorBlocks:
    """Computes raw-pixel descriptors: 16 x 16 RGB, mean removed, unit length."""

    def rows() -> Iterator[np.ndarray]:
        size, seed = evaluation.batch_size, evaluation.corruption_seed
        for batch in eval_batches(images, data, size, corruption, seed):
            yield _shrunk(batch)

    flat = np.concatenate(list(rows()))
    flat = flat - flat.mean(axis=1, keepdims=True)
    norms = np.sqrt(np.sum(flat * flat, axis=1, keepdims=True) + 1e-6)
    unit = np.where(norms > 1e-2, flat / norms, 1 / np.sqrt(flat.shape[1]))
    return DescriptorBlocks({"pixels": unit.astype(np.float32)})


def _shrunk(batch: UInt8[np.ndarray, "b s s 3"]) -> Float32[np.ndarray, "b p"]:
    import cv2

    side = (PIXEL_SIDE, PIXEL_SIDE)
    small = [cv2.resize(each, side, interpolation=cv2.INTER_AREA) for each in batch]
    return np.stack(small).reshape(len(batch), -1).astype(np.float32) / 255
