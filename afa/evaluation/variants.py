"""Variants of the result table: the descriptor blocks that each fuses, their weights, its cost."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import PyTree

from afa import parallel
from afa.config import ExperimentConfig
from afa.models.networks import Networks

GRID = (0.0, 0.25, 0.5, 1.0, 2.0)  # weights tried for a block, beside 1 for the global view of x
LEAST_GAIN = 1e-3  # gain in validation MAP@R that justifies the cost of another block
Weights = dict[str, float]
Score = Callable[[Weights], float]


@dataclass(frozen=True)
class Variant:
    """A descriptor: its source, its blocks and its cost.

    Attributes:
      name: name in tables.
      source: "trained", "initial" (the backbone at step 0 with published or random weights,
        without heads) or "pixels".
      weights: block -> weight in the fused vector.
      cost: FLOPs per query relative to one forward pass of F; None for raw pixels.
    """

    name: str
    source: str
    weights: Weights
    cost: float | None


def choose_weights(score: Score, blocks: Sequence[str], sweeps: int = 2) -> Weights:
    """Chooses fusion weights by coordinate ascent on `GRID`, starting from the global view.

    Args:
      score: weights (some may be 0) -> the metric to maximise, on validation classes.
      blocks: blocks beside "global"; a block is left out unless it gains `LEAST_GAIN`.
      sweeps: passes over all blocks.

    Returns:
      Block -> weight, all above 0.
    """
    weights: Weights = {"global": 1.0} | dict.fromkeys(blocks, 0.0)
    best = score(weights)
    for _ in range(sweeps):
        before = dict(weights)
        for block in blocks:
            for value in GRID:
                trial = weights | {block: value}
                if value != weights[block]:
                    found = score(trial)
                    needed = LEAST_GAIN if value > weights[block] else 0.0
                    if found > best + needed:
                        best, weights = found, trial
        if weights == before:
            break
    return {name: weight for name, weight in weights.items() if weight > 0}


def build_variants(
    networks: Networks, score: Score, initial_score: Score, costs: "Costs"
) -> list[Variant]:
    """Builds all variants of a run; the last one is "fused".

    Args:
      networks: networks of the run.
      score: fusion weights -> validation metric of the trained networks.
      initial_score: the same of the initial weights.
      costs: FLOPs of the networks.
    """
    initial = choose_weights(initial_score, ["local", *networks.view_names])
    table = [
        Variant("raw pixels", "pixels", {"pixels": 1.0}, None),
        Variant("initial weights", "initial", {"global": 1.0}, 1.0),
        Variant("initial weights, fused", "initial", initial, costs.of(initial)),
    ]

    def add(name: str, weights: Weights) -> None:
        table.append(Variant(name, "trained", weights, costs.of(weights)))

    add("F", {"global": 1.0})
    add("local", {"local": 1.0})
    views = [*networks.view_names, *(["restored"] if networks.generator else [])]
    for view in views:
        label = "G" if view == "restored" else view
        add(f"{label} alone", {view: 1.0})
        add(f"F + {label}", choose_weights(score, [view]))
    others = ["local", *views, "posterior"]
    if "imagenet" in networks.block_names():
        add("published classes alone", {"imagenet": 1.0})
        others.append("imagenet")
    if networks.discriminator is not None:
        add("D features alone", {"discriminator": 1.0})
        others.append("discriminator")
    add("fused", choose_weights(score, others))
    return table


@dataclass(frozen=True)
class Costs:
    """FLOPs of one image in F, G and D, as counted by XLA.

    Attributes:
      gated: whether D gates the restored view.
      lower: the lower part of F, if D reads its mid maps; else 0.
    """

    embedder: float
    generator: float
    discriminator: float
    gated: bool
    lower: float = 0.0

    def of(self, weights: Mapping[str, float]) -> float:
        """Cost of a variant relative to one forward pass of F."""
        passes = {"global", "local", "posterior"} & set(weights)
        embedder = bool(passes) + len(
            set(weights) - {"global", "local", "posterior", "discriminator"}
        )
        restored = "restored" in weights
        judged = 2 * (restored and self.gated) or ("discriminator" in weights)
        total = embedder * self.embedder + restored * self.generator + judged * self.discriminator
        total += bool(judged) * self.lower
        return total / self.embedder


def costs(networks: Networks, variables: Mapping[str, PyTree], config: ExperimentConfig) -> Costs:
    """Counts the FLOPs of every network for one image."""
    size = config.data.image_size
    image = jnp.zeros((1, size, size, 3))
    space, embedder = networks.space, networks.embedder
    x = jnp.zeros((1, *space.shape(embedder, size)))
    to_space = functools.partial(space.of, embedder)

    def count(module: object, name: str, *args: PyTree, **kwargs: object) -> float:
        if module is None:
            return 0.0
        return parallel.flops(lambda v, *a: module.apply(v, *a, **kwargs), variables[name], *args)  # pyright: ignore

    return Costs(
        count(networks.embedder, "embedder", image, train=False),
        count(networks.generator, "generator", x, method="restore"),
        count(networks.discriminator, "discriminator", x, train=False),
        config.adversarial.gate != "fixed",
        0.0 if space.images else parallel.flops(to_space, variables["embedder"], image),
    )
