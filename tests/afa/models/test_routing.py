"""Judges of the views of a query, and the routed query."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from arrays import apply, near

from afa.inference.embed import DescriptorBlocks
from afa.models import routing, views
from afa.models.fusion import Fusion, Route, fuse


@pytest.fixture(scope="module")
def composed():
    made = tiny.context(tiny.config())
    networks = dataclasses.replace(made.networks, view_names=("flip", "median"))
    images = jnp.asarray(tiny.batch()["image"] / 255, jnp.float32)
    return networks, tiny.state(made).variables, images


@pytest.fixture(scope="module")
def everything(composed):
    networks, variables, images = composed
    return DescriptorBlocks(
        *jax.tree.map(np.asarray, jax.jit(networks.everything)(variables, images))
    )


def test_candidates(composed):
    networks = composed[0]
    assert networks.candidates() == ("original", "median", "restored")  # not the flipped one
    joint = dataclasses.replace(networks, restored_branch="adversarial")
    assert joint.candidates() == ("original", "median")
    without = dataclasses.replace(networks, generator=None, discriminator=None)
    assert without.candidates() == ("original", "median")


def test_judges_of_a_discriminator():
    def judges(**changes):
        return set(tiny.networks(tiny.config(**changes)).judges())

    assert judges() == set(routing.JUDGES)
    assert judges(**{"generator.name": "residual"}) == set(routing.JUDGES) - {"damage"}
    without = dataclasses.replace(
        tiny.networks(tiny.config()), generator=None, discriminator=None
    ).judges()
    assert without == ("confidence", "hand_made", "random")


def test_everything_has_the_blocks_of_search_and_those_of_the_views(composed, everything):
    networks, variables, images = composed
    blocks = jax.jit(networks.blocks)(variables, images)
    assert set(blocks) == set(everything.blocks)
    for name, block in blocks.items():
        near(everything.blocks[name], block, 1e-5)
    assert set(everything.candidates) == set(networks.candidates())
    for name in ("global", "local", "posterior"):
        near(everything.candidates["original"][name], blocks[name], 1e-5)
    near(everything.candidates["restored"]["global"], blocks["restored"], 1e-5)
    assert set(everything.scores) == set(routing.JUDGES)


def test_scores_of_the_discriminator_and_of_confidence(composed, everything):
    networks, variables, images = composed
    seen = {
        "original": images,
        "median": views.median(images),
        "restored": networks.restore(variables, images),
    }
    for name, view in seen.items():
        logits = apply(networks.discriminator, variables["discriminator"], view, train=False).logit
        near(everything.scores["discriminator"][name], logits, 1e-4)
        described = apply(networks.embedder, variables["embedder"], view, train=False)
        posterior = apply(
            networks.embedder, variables["embedder"], described.global_descriptor,
            method="posterior",
        )  # fmt: skip
        near(everything.scores["confidence"][name], posterior.max(1), 1e-4)


def test_scores_by_damage(composed, everything):
    """The share of the query that D finds damaged speaks for G, and nothing for another view."""
    networks, variables, images = composed
    pixels = apply(networks.discriminator, variables["discriminator"], images, train=False).pixels
    share = (1 / (1 + np.exp(np.asarray(pixels)))).mean((1, 2))
    assert np.ptp(share) > 0.01
    found = everything.scores["damage"]
    near(found["restored"], share)
    assert (found["original"] == 0).all() and (found["median"] == 0).all()
    estimate = jnp.asarray([[[0.0, 1.0], [0.5, 0.1]]])
    none: Any = dict.fromkeys(("logits", "posteriors"))
    asked = []

    def damage(x):
        asked.append(x)
        return estimate

    seen = {"original": images[:1], "restored": images[1:2]}
    found = routing.damage(routing.Views(seen, damage=damage, **none))
    near(found["restored"], [0.4])
    near(found["original"], [0.0])
    assert len(asked) == 1 and asked[0] is seen["original"]


def test_hand_made_scores_measure_impulses_and_noise():
    draw = np.random.default_rng(0)
    smooth = np.linspace(0.2, 0.8, 32 * 32 * 3).reshape(1, 32, 32, 3)
    noisy = smooth + draw.normal(0, 0.1, smooth.shape)
    impulses = smooth.copy()
    hit = draw.random((1, 32, 32)) < 0.1
    impulses[hit] = draw.integers(0, 2, (1, 32, 32))[hit][:, None]
    x = jnp.asarray(np.concatenate([smooth, noisy, impulses]), jnp.float32)
    none: Any = dict.fromkeys(("logits", "posteriors", "damage"))
    found = routing.hand_made(routing.Views({"original": x, "median": x, "restored": x}, **none))
    assert (found["original"] == 0).all()
    median, restored = found["median"], found["restored"]
    assert median[2] > 3 * max(median[0], median[1])
    assert restored[1] > 3 * restored[0]
    # The deviation of the mean of three channels of noise is 0.1 / sqrt(3).
    assert restored[1] == pytest.approx(routing.NOISE_GAIN * 0.1 / np.sqrt(3), rel=0.2)


def test_random_scores_depend_on_the_query_alone(composed):
    _, _, images = composed
    none: Any = dict.fromkeys(("logits", "posteriors", "damage"))

    def scores(x):
        return np.stack(
            list(routing.random(routing.Views({"original": x, "median": x}, **none)).values())
        )

    np.testing.assert_array_equal(scores(images)[:, :4], scores(images[:4]))
    assert len(np.unique(scores(images))) == 2 * len(images)


def test_pick_and_chosen():
    scores = {"a": jnp.array([1.0, 0.0, 2.0]), "b": jnp.array([0.0, 1.0, 2.0])}
    index = routing.chosen(scores, (("a", 0.0), ("b", 0.0)))
    np.testing.assert_array_equal(index, [0, 1, 0])  # the first of equals
    np.testing.assert_array_equal(routing.chosen(scores, (("a", 0.0), ("b", 1.5))), [1, 1, 1])
    rows = [jnp.full((3, 2, 2), value) for value in (5.0, 7.0)]
    np.testing.assert_array_equal(routing.pick(index, rows)[:, 0, 0], [5, 7, 5])


@pytest.mark.parametrize("judge", routing.JUDGES)
def test_vectors_of_search_equal_those_of_evaluation(composed, everything, judge):
    """With offsets at which every view is chosen for some queries."""
    networks, variables, images = composed
    scores = everything.scores[judge]
    offsets = [("original", 0.0)]
    for view, share in (("median", 0.7), ("restored", 0.4)):
        offsets.append((view, float(np.quantile(scores["original"] - scores[view], share))))
    route = Route(judge, tuple(offsets))
    fusion = Fusion.of({"global": 1.0, "local": 0.5, "flip": 0.25}, route)
    assert len(np.unique(everything.chosen(route))) > 1
    searched = jax.jit(lambda v, x: networks.vectors(v, x, fusion))(variables, images)
    near(searched, everything.fused(fusion), 1e-4)
    gallery = jax.jit(lambda v, x: networks.vectors(v, x, fusion, "gallery"))(variables, images)
    plain = jax.jit(networks.blocks)(variables, images)
    near(gallery, fuse(plain, dict(fusion.weights)), 1e-4)


def test_a_route_of_one_view_asks_no_judge(composed, everything):
    networks, variables, images = composed
    fusion = Fusion.of({"global": 1.0}, Route("", (("restored", 0.0),)))
    found = jax.jit(lambda v, x: networks.vectors(v, x, fusion))(variables, images)
    near(found, everything.blocks["restored"], 1e-4)
    near(everything.fused(fusion), everything.blocks["restored"], 1e-4)
