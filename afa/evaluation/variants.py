"""The variants of the result table: which blocks each fuses, with what weights, at what cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from afa.config import ExperimentConfig
from afa.models.networks import Networks

GRID = (0.0, 0.25, 0.5, 1.0, 2.0)  # weights tried for a block, beside 1 for the global view of x
LEAST_GAIN = 1e-3  # validation MAP@R a block has to add, so that noise does not cost search time
Weights = dict[str, float]
Score = Callable[[Weights], float]


@dataclass(frozen=True)
class Variant:
    """One way to describe an image.

    Attributes:
      name: as it stands in tables.
      source: "trained", "initial" (the backbone at step 0, published weights or random ones,
        without heads) or "pixels".
      weights: block -> weight in the fused vector.
      cost: multiply-adds of one search relative to one pass of F; None for raw pixels.
    """

    name: str
    source: str
    weights: Weights
    cost: float | None


def choose_weights(score: Score, blocks: Sequence[str], sweeps: int = 2) -> Weights:
    """Coordinate ascent on the grid, from the global view; a block without a gain is left out.

    Args:
      score: weights (some may be 0) -> the figure to raise, on validation classes.
      blocks: names beside "global".
      sweeps: how often every block is revisited.
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
    """All variants of a run, the fused ones with weights chosen by `score`; `initial_score` is that
    of the initial weights."""
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
    seconds = [*networks.view_names, *(["restored"] if networks.generator else [])]
    for view in seconds:
        shown = "G" if view == "restored" else view
        add(f"{shown} alone", {view: 1.0})
        add(f"F + {shown}", choose_weights(score, [view]))
    others = ["local", *seconds, "posterior"]
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
    """Floating-point operations of one image through F, G and D, as XLA counts them."""

    embedder: float
    generator: float
    discriminator: float
    gated: bool

    def of(self, weights: Mapping[str, float]) -> float:
        """Cost of a variant relative to one pass of F."""
        passes = {"global", "local", "posterior"} & set(weights)
        embedder = bool(passes) + len(
            set(weights) - {"global", "local", "posterior", "discriminator"}
        )
        restored = "restored" in weights
        judged = 2 * (restored and self.gated) or ("discriminator" in weights)
        total = embedder * self.embedder + restored * self.generator + judged * self.discriminator
        return total / self.embedder


def flops(function: Callable, *args: PyTree) -> float:
    """Operations of one call, counted from the lowered program; nothing is run or compiled."""
    analysis = jax.jit(function).lower(*args).cost_analysis()
    return float((analysis or {}).get("flops", 0.0))


def costs(networks: Networks, variables: Mapping[str, PyTree], config: ExperimentConfig) -> Costs:
    """Counts the operations of every network on one image."""
    size = config.data.image_size
    image = jnp.zeros((1, size, size, 3))

    def count(module: object, name: str, *args: PyTree, **kwargs: object) -> float:
        if module is None:
            return 0.0
        return flops(lambda v, *a: module.apply(v, *a, **kwargs), variables[name], *args)  # pyright: ignore

    return Costs(
        count(networks.embedder, "embedder", image, train=False),
        count(networks.generator, "generator", image, method="restore"),
        count(networks.discriminator, "discriminator", image, train=False),
        config.adversarial.gate != "fixed",
    )
