"""Variants of the result table: the fusion of each, chosen on validation classes, and its cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from afa import parallel
from afa.config import ExperimentConfig
from afa.models import layers
from afa.models.fusion import Fusion, Route
from afa.models.networks import Networks
from afa.models.routing import ORIGINAL, RESTORED

GRID = (0.0, 0.25, 0.5, 1.0, 2.0)  # weights tried for a block, beside 1 for the global view of x
QUANTILES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)  # shares of queries given to a view, tried
NEVER = -1e9  # offset of a view that is never chosen
LEAST_GAIN = 1e-3  # gain in validation MAP@R that justifies the cost of another block
Weights = dict[str, float]
Score = Callable[[Fusion], float]
# (judge, view, share) -> offset with which the view is chosen for that share of the queries
Offset = Callable[[str, str, float], float]


@dataclass(frozen=True)
class Variant:
    """A descriptor: its source, its fusion and its cost.

    Attributes:
      name: name in tables.
      source: "trained", "initial" (the backbone at step 0 with published or random weights,
        without heads) or "pixels".
      fusion: weights of its blocks, and the route of queries.
      cost: FLOPs per query relative to one forward pass of F; None for raw pixels.
    """

    name: str
    source: str
    fusion: Fusion
    cost: float | None


def choose_weights(
    score: Score,
    blocks: Sequence[str],
    affordable: Callable[[Fusion], bool] = lambda _: True,
    sweeps: int = 2,
) -> Weights:
    """Chooses fusion weights by coordinate ascent on `GRID`, starting from the global view.

    Args:
      score: fusion (some weights may be 0) -> the metric to maximise, on validation classes.
      blocks: blocks beside "global"; a block is left out unless it gains `LEAST_GAIN`.
      affordable: whether a fusion may be chosen.
      sweeps: passes over all blocks.

    Returns:
      Block -> weight, all above 0.
    """
    weights: Weights = {"global": 1.0} | dict.fromkeys(blocks, 0.0)
    best = score(Fusion.of(weights))
    for _ in range(sweeps):
        before = dict(weights)
        for block in blocks:
            for value in GRID:
                trial = weights | {block: value}
                if value == weights[block] or not affordable(Fusion.of(_used(trial))):
                    continue
                found = score(Fusion.of(trial))
                needed = LEAST_GAIN if value > weights[block] else 0.0
                if found > best + needed:
                    best, weights = found, trial
        if weights == before:
            break
    return _used(weights)


def _used(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if weight > 0}


def choose_offsets(
    score: Score, weights: Weights, judge: str, views: Sequence[str], offset: Offset
) -> Route:
    """Chooses the offsets of a judge by coordinate ascent, starting from the original alone.

    Args:
      score: as in `choose_weights`.
      weights: block -> weight.
      views: candidates beside the original.
      offset: gives the offsets to try.

    Returns:
      The route among the original and the views; a view that gains nothing is never chosen.
    """
    offsets = {ORIGINAL: 0.0} | dict.fromkeys(views, NEVER)
    best = score(Fusion.of(weights))
    for _ in range(2):
        before = dict(offsets)
        for view in views:
            for value in (NEVER, *(offset(judge, view, share) for share in QUANTILES)):
                trial = offsets | {view: value}
                found = score(Fusion.of(weights, Route(judge, tuple(trial.items()))))
                if found > best:
                    best, offsets = found, trial
        if offsets == before:
            break
    return Route(judge, tuple(offsets.items()))


def without_unused(route: Route) -> Route | None:
    """The route without views that are never chosen; None if only the original is left."""
    kept = tuple((view, offset) for view, offset in route.offsets if offset > NEVER)
    return Route(route.judge, kept) if len(kept) > 1 else None


def build_variants(
    networks: Networks,
    score: Score,
    initial_score: Score,
    offset: Offset,
    costs: "Costs",
    limit: float,
) -> list[Variant]:
    """Builds all variants of a run; the last one is "fused".

    Args:
      networks: networks of the run.
      score: fusion -> validation metric of the trained networks.
      initial_score: the same of the initial weights.
      offset: offsets to try for a route.
      costs: FLOPs of the networks.
      limit: largest cost of "fused"; 0: none.
    """
    initial = Fusion.of(choose_weights(initial_score, ["local", *networks.view_names]))
    only_global = {"global": 1.0}
    table = [
        Variant("raw pixels", "pixels", Fusion.of({"pixels": 1.0}), None),
        Variant("initial weights", "initial", Fusion.of(only_global), 1.0),
        Variant("initial weights, fused", "initial", initial, costs.of(initial)),
    ]

    def add(name: str, weights: Weights, route: Route | None = None) -> None:
        fusion = Fusion.of(weights, route)
        table.append(Variant(name, "trained", fusion, costs.of(fusion)))

    def affordable(fusion: Fusion) -> bool:
        return limit == 0 or costs.of(fusion) <= limit

    add("F", only_global)
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
    candidates = networks.candidates()[1:]
    for view in candidates:
        label = "G" if view == RESTORED else view
        add(f"query {label}", only_global, Route("", ((view, 0.0),)))
    judges = networks.judges() if candidates else ()
    for judge in judges:
        route = choose_offsets(score, only_global, judge, candidates, offset)
        add(f"query by {judge}", only_global, without_unused(route))
    weights = choose_weights(score, others, affordable)
    add("fused", weights, _best_route(score, weights, candidates, judges, offset, affordable))
    return table


def _best_route(
    score: Score,
    weights: Weights,
    candidates: Sequence[str],
    judges: Sequence[str],
    offset: Offset,
    affordable: Callable[[Fusion], bool],
) -> Route | None:
    """Returns the affordable route with the largest gain, at least `LEAST_GAIN`; else None."""
    best, chosen = score(Fusion.of(weights)) + LEAST_GAIN, None
    tuned = (choose_offsets(score, weights, judge, candidates, offset)
             for judge in judges if judge != "random")  # fmt: skip
    fixed = (Route("", ((view, 0.0),)) for view in candidates)
    for route in (*fixed, *filter(None, map(without_unused, tuned))):
        fusion = Fusion.of(weights, route)
        if affordable(fusion) and (found := score(fusion)) > best:
            best, chosen = found, route
    return chosen


@dataclass(frozen=True)
class Costs:
    """FLOPs of one image, as counted by XLA.

    Attributes:
      embedder: of F.
      generator: of G, with D's map of the damage if G reads it.
      discriminator: of D's logit of the whole.
      lower: the lower part of F, if D reads its mid maps; else 0.
      localises: whether G reads D's map of the damage; D's features then come from the same pass.
    """

    embedder: float
    generator: float
    discriminator: float
    lower: float = 0.0
    localises: bool = False

    def of(self, fusion: Fusion) -> float:
        """Cost of a query relative to one forward pass of F."""
        blocks, route = set(fusion.blocks), fusion.route
        passes = bool({"global", "local", "posterior"} & blocks) + len(
            blocks - {"global", "local", "posterior", "discriminator"}
        )
        generated = "restored" in blocks or (route is not None and RESTORED in route.views)
        # Images that D sees beside those that G restores.
        seen = int("discriminator" in blocks and not (generated and self.localises))
        if route is not None:
            choices = len(route.views) if len(route.views) > 1 else 0
            seen += choices * (route.judge == "discriminator")
            passes += choices * (route.judge == "confidence")
        total = passes * self.embedder + generated * self.generator + seen * self.discriminator
        return (total + bool(seen) * self.lower) / self.embedder


def costs(networks: Networks, variables: Mapping[str, PyTree], config: ExperimentConfig) -> Costs:
    """Counts the FLOPs of every network for one image."""
    size = config.data.image_size
    image = jnp.zeros((1, size, size, 3))
    space, embedder = networks.space, networks.embedder
    x = jnp.zeros((1, *space.shape(embedder, size)))

    def count(function: Callable[[Mapping[str, PyTree], Array], PyTree], at: Array) -> float:
        return parallel.flops(function, variables, at)

    has_generator = networks.generator is not None
    return Costs(
        count(lambda v, a: layers.apply(embedder, v["embedder"], a, train=False), image),
        count(networks.restore_point, x) if has_generator else 0.0,
        count(lambda v, a: networks.discriminate(v, a).logit, x) if has_generator else 0.0,
        0.0 if space.images else count(lambda v, a: space.of(embedder, v["embedder"], a), image),
        has_generator and networks.discriminator is not None and networks.discriminator.localise,
    )
