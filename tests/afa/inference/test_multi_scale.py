"""Multi-scale descriptors, and the features that a re-ranking study computes."""

import dataclasses

import numpy as np
import pytest
import tiny
from arrays import near

from afa.data.types import ImageSet
from afa.errors import UserError
from afa.evaluation import reranking
from afa.inference.embed import DescriptorBlocks, Embedding, Pyramid, scaled_side
from afa.models import backbones
from afa.models.backbones.contract import Member
from afa.models.fusion import Fusion, Route

WEIGHTS = {"discriminator": 2.0, "global": 1.0, "local": 0.5, "restored": 0.5}
FUSION = Fusion.of(WEIGHTS)


pytestmark = pytest.mark.usefixtures("unoptimised")


@pytest.fixture(scope="module")
def embedded():
    """An embedding, its variables and some images."""
    settings = tiny.config(**{"evaluation.batch_size": 4, "backbone.name": "resnet18"})
    context = tiny.context(settings)
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (48, 48, 3), np.uint8) for _ in range(5)]
    names = tuple("abcde")
    images = ImageSet(images, np.arange(5) // 2, names, np.zeros(5, bool))
    embedding = Embedding(context.networks, "resnet18", settings.data, settings.evaluation)
    return embedding, tiny.state(context).variables, images


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_one_scale_is_the_descriptor_itself(embedded):
    embedding, variables, images = embedded
    usual = embedding.fused(FUSION)(variables, images)
    for power in (1.0, 3.0):
        near(embedding.multi_scale(FUSION, (1.0,), power)(variables, images), usual, 1e-4)


def test_only_blocks_of_f_are_averaged_over_scales(embedded):
    embedding, variables, images = embedded
    found = embedding.multi_scale(FUSION, (1.0, 2.0))(variables, images)
    data = dataclasses.replace(embedding.data, image_size=2 * tiny.SIDE)
    small = embedding.blocks(variables, images)
    twice = Embedding(embedding.networks, "resnet18", data, embedding.evaluation)
    large = twice.some(variables, images, ("global", "local"))
    blocks = dict(small.blocks)
    for name in ("global", "local"):
        assert np.abs(large.blocks[name] - small.blocks[name]).max() > 1e-2
        blocks[name] = unit(small.blocks[name] + large.blocks[name])
    expected = np.concatenate([w**0.5 * blocks[name] for name, w in WEIGHTS.items()], axis=1)
    near(found, unit(expected), 1e-4)


def test_the_power_of_the_mean_keeps_signs():
    draw = np.random.default_rng(1)
    x, y = (unit(draw.normal(size=(4, 6)).astype(np.float32)) for _ in range(2))
    scales = {1.0: DescriptorBlocks({"a": x}), 0.5: DescriptorBlocks({"a": y})}
    pyramid, only = Pyramid(scales, DescriptorBlocks({})), Fusion.of({"a": 1.0})
    near(pyramid.fused(only, (1.0, 0.5), 3.0), unit(np.cbrt(x**3 + y**3)), 1e-4)
    near(pyramid.fused(only, (1.0, 0.5)), unit(x + y), 1e-4)
    near(pyramid.fused(only, (0.5,), 3.0), y, 1e-4)


def test_one_embedding_per_image_size(embedded):
    embedding = embedded[0]
    assert embedding.at(1.0) is embedding
    assert embedding.at(2.0) is embedding.at(2.01)
    assert embedding.at(2.0).data.image_size == 2 * tiny.SIDE


def test_scaled_sides_fit_the_backbone(monkeypatch):
    member = Member(lambda options: options, "nowhere", smallest=20, multiple=14)
    monkeypatch.setitem(backbones.MEMBERS, "patches", member)
    sides = {scale: scaled_side("patches", 112, scale) for scale in (0.01, 0.5, 0.7, 1.0, 1.4)}
    assert sides == {0.01: 28, 0.5: 56, 0.7: 84, 1.0: 112, 1.4: 154}
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="must be above 0"):
            scaled_side("patches", 112, scale)


# ---- features of a study -----------------------------------------------------------------------


def test_only_needed_features_are_computed(embedded, monkeypatch):
    embedding, variables, images = embedded
    usual = embedding.fused(FUSION)(variables, images)

    def embed(*names, **more):
        return reranking.embed_split(embedding, variables, FUSION, images, names, **more)

    least = embed("plain", "diffusion")
    near(least.known.vectors, usual)
    assert least.known.posterior.shape == (5, 0)
    assert not least.known.local_features
    assert not least.known.multi_scale
    assert set(least.milliseconds) == {reranking.DESCRIPTOR}
    shares = embed("class posterior").known.posterior
    assert shares.shape == (5, tiny.CLASSES)
    near(shares.sum(axis=1), np.ones(5))
    unit_shares = embedding.blocks(variables, images).blocks["posterior"]
    near(unit(shares), unit_shares, 1e-4)
    local_features = embed("local matches").known.local_features
    assert {scale: each.strength.shape for scale, each in local_features.items()} == {
        1.0: (5, 16), 2.0: (5, 64)
    }  # fmt: skip
    monkeypatch.setattr(reranking, "LOCAL_FEATURES", 3)
    few = embed("geometric verification").known.local_features[1.0]
    near(few.descriptor, local_features[1.0].descriptor[:, :3])
    begin = embed("plain", scales=(1.0, 2.0)).known.vectors
    near(begin, embedding.multi_scale(FUSION, (1.0, 2.0))(variables, images))


def test_every_choice_of_scales_and_its_cost(embedded, monkeypatch):
    embedding, variables, images = embedded
    monkeypatch.setattr(reranking, "SCALES", ((1.0, 2.0), (2.0,)))
    monkeypatch.setattr(reranking, "POWERS", (1.0, 3.0))
    split = reranking.embed_split(embedding, variables, FUSION, images, ("multi-scale",))
    found, spent = split.known.multi_scale, split.milliseconds
    assert set(found) == {((1.0, 2.0), 1.0), ((1.0, 2.0), 3.0), ((2.0,), 1.0), ((2.0,), 3.0)}
    for (scales, power), vectors in found.items():
        near(vectors, embedding.multi_scale(FUSION, scales, power)(variables, images))
        parts = [spent["rest"], *(spent["scale", each] for each in scales)]
        assert spent[scales, power] == pytest.approx(sum(parts))
    assert spent[(1.0, 2.0), 1.0] > spent[(2.0,), 1.0] > 0
    some = split.known.rows(np.array([3, 1]))
    np.testing.assert_array_equal(some.vectors, split.known.vectors[[3, 1]])
    for key, vectors in some.multi_scale.items():
        np.testing.assert_array_equal(vectors, found[key][[3, 1]])


def test_routed_queries_are_features_of_their_own(embedded):
    """At several scales queries are not routed, and have the features of the gallery."""
    embedding, variables, images = embedded
    fusion = Fusion.of({"global": 1.0}, Route("", (("restored", 0.0),)))
    split = reranking.embed_split(embedding, variables, fusion, images, ("plain",))
    near(split.known.vectors, embedding.fused(fusion, "gallery")(variables, images))
    index = np.array([3, 1])
    near(split.queries(index).vectors, embedding.fused(fusion)(variables, images)[index])
    as_query, as_gallery = embedding.in_both_roles(fusion)(variables, images)
    assert np.abs(as_query - as_gallery).max() > 1e-4
    near(as_gallery, split.known.vectors)
    both = reranking.embed_split(embedding, variables, fusion, images, ("plain",), (1.0, 2.0))
    assert both.query_features is None
