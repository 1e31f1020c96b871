"""The choice of fusion weights and routes, and the cost of a query."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from labelled_images import DIMENSION, image_set

from afa import parallel
from afa.evaluation.evaluator import ranked_metrics
from afa.evaluation.protocols import protocols
from afa.evaluation.variants import (
    GRID,
    LEAST_GAIN,
    NEVER,
    Costs,
    choose_offsets,
    choose_weights,
    costs,
    without_unused,
)
from afa.inference.embed import DescriptorBlocks
from afa.models.fusion import Fusion, Route
from afa.models.views import level, median


def test_weights_follow_the_score():
    """Every block comes to its best value, also one that pays only beside a later one."""

    def score(fusion):
        weights = dict(fusion.weights)
        return -((weights["flip"] - 1) ** 2) - (weights["local"] - weights["flip"] / 2) ** 2

    assert choose_weights(score, ["local", "flip"]) == {"global": 1.0, "local": 0.5, "flip": 1.0}


def test_a_block_without_a_gain_is_left_out():
    def weight(fusion, name):
        return dict(fusion.weights)[name]

    assert choose_weights(lambda f: -weight(f, "noise"), ["noise"]) == {"global": 1.0}
    small = choose_weights(lambda f: LEAST_GAIN * weight(f, "tiny") / 4, ["tiny"])
    assert small == {"global": 1.0}
    gain = {"global": 1.0, "good": max(GRID)}
    assert choose_weights(lambda f: 2 * LEAST_GAIN * weight(f, "good"), ["noise", "good"]) == gain
    few = choose_weights(lambda f: weight(f, "good"), ["good"], lambda f: "good" not in f.blocks)
    assert few == {"global": 1.0}  # too expensive


def test_weights_prefer_the_informative_block():
    """The global view and one block are noise; the other block knows the class."""
    images = image_set(8, 4, catalogue=False)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(images), DIMENSION))
    known = np.eye(DIMENSION)[images.labels] + 0.2 * rng.normal(size=noise.shape)
    other = rng.normal(size=noise.shape)
    blocks = {
        name: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for name, x in (("global", noise), ("known", known), ("other", other))
    }
    embedded, (protocol,) = DescriptorBlocks(blocks), protocols(images)

    def score(fusion):
        rows = embedded.fused(fusion)
        return ranked_metrics(rows, rows, images, protocol).means["map_at_r"]

    chosen = choose_weights(score, ["other", "known"])
    assert chosen["known"] == max(GRID)
    assert chosen.get("other", 0) < chosen["known"]
    assert score(Fusion.of(chosen)) > score(Fusion.of({"global": 1.0})) + 0.2


def test_costs_count_every_pass():
    few = Costs(embedder=10.0, generator=30.0, discriminator=5.0)

    def of(*blocks, judge="", views=()):
        route = Route(judge, tuple((view, 0.0) for view in views)) if views else None
        return few.of(Fusion.of(dict.fromkeys(blocks, 1.0), route))

    assert of("global") == of("local") == of("global", "local", "posterior") == 1
    assert of("global", "flip", "median") == 3
    assert of("restored") == 4
    assert of("global", "restored") == 5
    assert of("discriminator") == 0.5
    assert of("global", "discriminator") == 1.5
    of_mid_maps = dataclasses.replace(few, lower=4.0)
    only = Fusion.of({"discriminator": 1.0})
    assert of_mid_maps.of(only) == 0.9  # D needs the mid map
    # A query alone is routed: one pass of F, G if it is among the views, D for every view.
    assert of("global", views=["median"]) == 1
    assert of("global", views=["restored"]) == 4
    both = ["original", "restored"]
    assert of("global", judge="discriminator", views=both) == 5
    assert of("global", judge="confidence", views=both) == 6
    assert of("global", judge="damage", views=both) == 4  # G has asked D already
    # If G reads D's map, the features of D come from the same pass.
    assert of("global", "discriminator", judge="damage", views=both) == 4.5
    few = dataclasses.replace(few, localises=True)
    assert of("global", "discriminator", judge="damage", views=both) == 4
    assert of("restored", "discriminator") == 4
    assert of("global", "discriminator") == 1.5
    assert of("global", judge="hand_made", views=["original", "median"]) == 1


@pytest.mark.parametrize("kind", ["inpainting", "residual", "features"])
def test_costs_of_the_networks(kind):
    """Of one image: G counts with the D that it asks, and D alone for the logit of the whole."""
    config = tiny.config(**{"generator.name": kind})
    context = tiny.context(config)
    networks, variables = context.networks, tiny.state(context).variables
    found = costs(networks, variables, config)
    image = jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3))
    mid = jnp.zeros((1, 4, 4, 8))
    x, damage = (mid, mid[..., 0]) if kind == "features" else (image, image[..., 0])

    def flops(name, *given, **kwargs):
        module = getattr(networks, name)
        return parallel.flops(lambda v, *a: module.apply(v, *a, **kwargs), variables[name], *given)

    assert found.embedder == flops("embedder", image, train=False)
    generator, both = flops("generator", x, damage, method="restore"), 0.0
    if kind == "inpainting":
        both = flops("discriminator", x, train=False)
        assert both > 2.5 * found.discriminator > 0
    # The estimate needs no logit of the whole: a dense layer of 4 x 4 x 8 less.
    assert found.generator == pytest.approx(generator + both, rel=0.01)
    assert networks.discriminator is not None
    whole: Any = networks.discriminator.clone(localise=False)  # it has no decoder

    def logit(v, a):
        if both:  # what the filter removes is part of the input
            a = level(a)
            removed = a - median(a)
            a = jnp.concatenate([a, removed, jnp.abs(removed)], axis=-1)
        return whole.apply(v, a, train=False).logit

    expected = parallel.flops(logit, variables["discriminator"], x)
    if both:
        expected -= 2 * 6 * tiny.SIDE**2  # it brings the six further channels to [-1, 1] too
    assert found.discriminator == pytest.approx(expected, rel=0.01)
    lower = flops("embedder", image, train=False, method="lower") if kind == "features" else 0
    assert found.lower == pytest.approx(lower, rel=0.01)
    restored = Fusion.of({"restored": 1.0})
    assert found.of(restored) == pytest.approx(1 + found.generator / found.embedder)


def test_networks_without_a_generator_cost_nothing():
    config = tiny.config()
    context = tiny.context(config)
    networks = dataclasses.replace(context.networks, generator=None, discriminator=None)
    found = costs(networks, tiny.state(context).variables, config)
    assert (found.generator, found.discriminator, found.lower) == (0, 0, 0)
    assert found.embedder > 0


# ---- routes --------------------------------------------------------------------------------------


def routed(names, judge="discriminator"):
    return Route(judge, tuple(names.items()))


def blocks_of_views():
    """Three queries: the judge prefers the original, the median filter, and G."""

    def eye(shift):
        return np.roll(np.eye(3, dtype=np.float32), shift, axis=1)

    views = {name: {"global": eye(i), "local": eye(i), "posterior": eye(i)}
             for i, name in enumerate(("original", "median", "restored"))}  # fmt: skip
    scores = {"original": [2, 0, 0], "median": [0, 2, 1], "restored": [1, 1, 2]}
    each = {name: np.asarray(row, np.float32) for name, row in scores.items()}
    blocks = {"global": eye(0), "local": eye(0), "flip": eye(0)}
    return DescriptorBlocks(blocks, views, {"discriminator": each})


def test_a_query_has_the_blocks_of_its_best_view():
    embedded = blocks_of_views()
    every = routed({"original": 0.0, "median": 0.0, "restored": 0.0})
    np.testing.assert_array_equal(embedded.chosen(every), [0, 1, 2])
    both = Fusion.of({"global": 1.0, "flip": 1.0}, every)
    fused = embedded.fused(both)
    expected = np.stack([np.roll(np.eye(3)[i], i) for i in range(3)])
    np.testing.assert_allclose(fused[:, :3], expected / np.sqrt(2), atol=1e-5)
    np.testing.assert_allclose(fused[:, 3:], np.eye(3) / np.sqrt(2), atol=1e-5)  # not routed
    gallery = embedded.fused(both, "gallery")
    np.testing.assert_allclose(gallery[:, :3], np.eye(3) / np.sqrt(2), atol=1e-5)
    never = routed({"original": 0.0, "median": NEVER, "restored": -1.5})
    np.testing.assert_array_equal(embedded.chosen(never), [0, 0, 2])
    one = Route("", (("median", 0.0),))
    np.testing.assert_array_equal(embedded.chosen(one), [0, 0, 0])
    np.testing.assert_allclose(
        embedded.fused(Fusion.of({"global": 1.0}, one)), np.roll(np.eye(3), 1, axis=1), atol=1e-5
    )


def test_offsets_follow_the_score():
    """The best of the offsets tried; a view that gains nothing is never chosen."""
    tried = {0.02: -3.0, 0.05: -2.0, 0.1: -1.0, 0.25: 0.0, 0.5: 1.0, 0.75: 2.0, 0.9: 3.0}

    def score(fusion):
        if fusion.route is None:
            return 0.5
        offsets = dict(fusion.route.offsets)
        return 1 - abs(offsets["restored"] - 1) / 10 - (offsets["median"] > NEVER)

    found = choose_offsets(
        score, {"global": 1.0}, "discriminator", ["median", "restored"],
        lambda judge, view, share: tried[share],
    )  # fmt: skip
    assert found == routed({"original": 0.0, "median": NEVER, "restored": 1.0})
    assert without_unused(found) == routed({"original": 0.0, "restored": 1.0})
    nothing = choose_offsets(
        lambda fusion: 0.5, {"global": 1.0}, "random", ["median"], lambda *_: 0.0
    )
    assert without_unused(nothing) is None


def test_a_fusion_is_stored_and_read():
    route = routed({"original": 0.0, "restored": -0.5})
    for fusion in (Fusion.of({"global": 1.0, "local": 0.5}), Fusion.of({"global": 1.0}, route)):
        assert Fusion.from_json(json.loads(json.dumps(fusion.to_json()))) == fusion
    one = {"global": 1.0}
    every = [Fusion.of(one | {"local": 0.5}), Fusion.of(one, route),
             Fusion.of(one, Route("", (("median", 0.0),)))]  # fmt: skip
    assert [fusion.text() for fusion in every] == [
        "global 1, local 0.5",
        "global 1; query by discriminator: original +0, restored -0.5",
        "global 1; query: median",
    ]
