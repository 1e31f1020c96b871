"""Protocols and the table of rows, on descriptors whose figures are known."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_run
from labelled_images import DIMENSION, image_set

from afa.config import with_changes
from afa.data.corruptions import CORRUPTIONS, held_back
from afa.data.types import Dataset, ImageSet
from afa.errors import UserError
from afa.evaluation import protocols as protocol_module
from afa.evaluation import variants
from afa.evaluation.evaluator import Evaluator
from afa.evaluation.protocols import Rule, drawn_evenly, protocols, supported
from afa.evaluation.variants import GRID, Costs, Variant
from afa.inference.embed import DescriptorBlocks, Embedding, pixels
from afa.models.fusion import Fusion
from afa.models.networks import build_networks
from afa.models.routing import JUDGES
from experiments import run as command

# ---- protocols -----------------------------------------------------------------------------------


def test_leave_one_out_protocol():
    images = image_set(3, 4)
    first, second = protocols(images)
    assert (first.name, second.name) == ("leave_one_out", "catalogue")
    wild = np.flatnonzero(~images.catalogue)
    np.testing.assert_array_equal(first.queries, wild)
    np.testing.assert_array_equal(first.gallery, wild)
    np.testing.assert_array_equal(first.queries, first.gallery[first.exclude])


def test_catalogue_images_are_the_gallery_and_not_queries():
    images = image_set(3, 4)
    (protocol,) = protocols(images, "catalogue")
    assert images.catalogue[protocol.gallery].all() and len(protocol.gallery) == 3
    assert not images.catalogue[protocol.queries].any() and len(protocol.queries) == 12
    assert (protocol.exclude == -1).all()


def test_query_gallery_protocol():
    images = image_set(3, 4)
    roles = np.arange(len(images)) % 2 == 0
    images = dataclasses.replace(images, gallery=roles)
    first, second = protocols(images)
    assert (first.name, second.name) == ("query_gallery", "catalogue")
    wild = ~images.catalogue
    np.testing.assert_array_equal(first.queries, np.flatnonzero(wild & ~roles))
    np.testing.assert_array_equal(first.gallery, np.flatnonzero(wild & roles))
    assert (first.exclude == -1).all()
    np.testing.assert_array_equal(first.queries, second.queries)
    (whole,) = [each for each in protocols(images, "leave_one_out") if each.name != "catalogue"]
    np.testing.assert_array_equal(whole.queries, np.flatnonzero(wild))
    some = images.subset(np.array([4, 0, 7]))
    np.testing.assert_array_equal(some.gallery, [True, True, False])


@pytest.mark.parametrize(
    ("choice", "needed"),
    [("catalogue", "catalogue images"),
     ("query_gallery", "images that the data set calls queries and gallery")],
)  # fmt: skip
def test_a_protocol_that_the_split_does_not_allow_is_refused(choice, needed):
    with pytest.raises(UserError) as error:
        protocols(image_set(3, 4, catalogue=False), choice)
    assert str(error.value) == (
        f"evaluation.protocol='{choice}' needs {needed}, and the test classes have none"
    )


def test_an_unknown_protocol_is_refused():
    allowed = ", ".join(sorted(["auto", *protocol_module.PROTOCOLS]))
    with pytest.raises(UserError) as error:
        protocols(image_set(3, 4), "catalog")
    assert str(error.value) == (
        f"evaluation.protocol='catalog' is unknown; did you mean 'catalogue'? (allowed: {allowed})"
    )


def test_auto_takes_protocols_with_the_queries_of_the_main_one():
    images = image_set(3, 4)
    names = [one.name for one in supported(images)]
    assert names[0] == "leave_one_out" and {"halves", "catalogue"} < set(names)
    assert [one.name for one in protocols(images)] == ["leave_one_out", "catalogue"]
    (halves,) = protocols(images, "halves")
    assert not set(halves.queries) & set(halves.gallery)
    nothing = dataclasses.replace(images, catalogue=np.ones(len(images), bool))
    assert len(protocols(nothing)[0].queries) == 0  # the run reports that no query has a match
    wild = np.flatnonzero(~images.catalogue)
    np.testing.assert_array_equal(np.sort([*halves.queries, *halves.gallery]), wild)


def test_a_protocol_is_one_function_and_one_line(monkeypatch):
    def first_image(images):
        """The first image of every class is the gallery."""
        gallery = np.sort(np.unique(images.labels, return_index=True)[1])
        return np.setdiff1d(np.arange(len(images)), gallery), gallery

    monkeypatch.setitem(protocol_module.PROTOCOLS, "first_image", Rule(first_image, "images"))
    (found,) = protocols(image_set(3, 4, catalogue=False), "first_image")
    assert (found.name, len(found.queries), len(found.gallery)) == ("first_image", 9, 3)
    assert (found.exclude == -1).all()


def test_without_a_catalogue_there_is_one_protocol():
    images = image_set(3, 4, catalogue=False)
    assert [each.name for each in protocols(images)] == ["leave_one_out"]
    assert [each.name for each in protocols(image_set(3, 4), "leave_one_out")] == ["leave_one_out"]


@pytest.mark.parametrize("count", [1, 5, 6, 13, 29])
def test_queries_are_drawn_evenly(count):
    """No class has two more than another that still has images; the draw is a subset in order."""
    labels = np.array([0] * 20 + [1] * 7 + [2] * 3)
    images = ImageSet(
        [np.zeros((1, 1, 3), np.uint8)] * 30, labels, tuple(map(str, range(30))),
        np.zeros(30, bool),
    )  # fmt: skip
    index = np.arange(30)
    drawn = drawn_evenly(images, index, count, seed=1)
    assert len(drawn) == count
    np.testing.assert_array_equal(drawn, np.unique(drawn))
    np.testing.assert_array_equal(drawn, drawn_evenly(images, index, count, seed=1))
    taken, there = np.bincount(labels[drawn], minlength=3), np.bincount(labels)
    unfinished = taken[taken < there]
    assert not len(unfinished) or unfinished.min() >= taken.max() - 1


def test_a_draw_of_all_is_all_of_them():
    images = image_set(3, 4)
    index = np.flatnonzero(~images.catalogue)
    for count in (0, 12, 100):
        np.testing.assert_array_equal(drawn_evenly(images, index, count, 0), index)
    draws = {tuple(drawn_evenly(images, index, 5, seed)) for seed in range(6)}
    assert len(draws) > 1
    assert all(set(draw) <= set(index.tolist()) for draw in draws)


# ---- the evaluator -------------------------------------------------------------------------------


CANDIDATES = ("original", "median", "standardise", "restored")


class Fake:
    """An embedding made from labels: `how(labels, rng)` returns the global descriptors."""

    def __init__(self, names, how):
        self.names, self.how = names, how
        self.seen = []

    def blocks(self, variables, images, corruption=None):
        self.seen.append((len(images), corruption))
        # The descriptors depend on image and corruption, not on the subset of images.
        rng = np.random.default_rng(len(str(corruption)))
        row_of = {name: i for i, name in enumerate(sorted(images.ids))}
        found = self.how(images.labels, rng)[[row_of[name] for name in images.ids]]
        if self.how is oracle:
            found = self.how(images.labels, rng)
        unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        unit = unit.astype(np.float32)
        view = dict.fromkeys(("global", "local", "posterior"), unit)
        blocks: dict[str, Any] = dict.fromkeys(self.names, unit)
        views: dict[str, Any] = dict.fromkeys(CANDIDATES, view)
        scores = {name: rng.normal(size=len(unit)).astype(np.float32) for name in CANDIDATES}
        judges: dict[str, Any] = dict.fromkeys(JUDGES, scores)
        return DescriptorBlocks(blocks, views, judges)

    def pooled(self, variables, images, wanted, corruption=None):
        blocks = self.blocks(variables, images, corruption).blocks
        return DescriptorBlocks({name: blocks[name] for name in wanted})

    def plain(self, variables, images, corruption=None):
        embedded = self.blocks(variables, images, corruption)
        own = embedded.blocks["global"]
        return DescriptorBlocks({"global": own, "local": own, "fused": own})


def oracle(labels, rng):
    return np.eye(DIMENSION)[labels]


def chance(labels, rng):
    return rng.normal(size=(len(labels), DIMENSION))


@pytest.fixture(scope="module")
def parts():
    """Networks, configuration and a data set whose metrics at chance are known."""
    config = command.parse(tiny_run.words("", "", **{"evaluation.severities": (1, 5)}))
    config = with_changes(config, **{"evaluation.corruption_queries": 12})
    train, validation, test = (image_set(n, 6, first=f) for n, f in ((4, 0), (5, 4), (10, 9)))
    names = tuple(f"class {i}" for i in range(19))
    data = Dataset("fake", train, validation, test, names, "made up", "0" * 64, "0" * 64)
    return build_networks(config, 4), config, data


def evaluator(parts, how):
    networks, config, dataset = parts
    made = Evaluator(networks, config, dataset)
    made.embedding = Fake(networks.block_names(), how)  # pyright: ignore[reportAttributeAccessIssue]
    return made


ROWS = [
    Variant("raw pixels", "pixels", Fusion.of({"pixels": 1.0}), None),
    Variant("F", "trained", Fusion.of({"global": 1.0}), 1.0),
    Variant("fused", "trained", Fusion.of({"global": 1.0, "local": 0.5}), 1.0),
]


def table_of(parts, how):
    notes = []
    results = evaluator(parts, how).test({}, {}, ROWS, notes.append)
    assert len(notes) == len(CORRUPTIONS)
    return results


def test_perfect_descriptors_score_1(parts):
    made = evaluator(parts, oracle)
    assert set(made.validation({}).values()) == {1.0}
    results = table_of(parts, oracle)
    for name in ("F", "fused"):
        for protocol in ("leave_one_out", "catalogue"):
            row = results.variants[name][protocol]
            assert set(row["clean"].values()) == {1.0}
            for group in ("trained", "held_back"):
                assert set(row[group].values()) == {1.0}
    assert results.variants["raw pixels"]["leave_one_out"]["clean"]["recall_at_1"] < 1


def test_validation_uses_the_view_of_a_trained_generator(parts):
    """Checkpoints are compared by the descriptor of search, with G's view once G is trained."""
    made = evaluator(parts, chance)
    both = made.embedding

    class RestoredKnows(Fake):
        def some(self, variables, images, wanted, corruption=None):
            blocks = dict(both.blocks(variables, images, corruption).blocks)
            exact = np.eye(DIMENSION, dtype=np.float32)[images.labels % DIMENSION]
            return DescriptorBlocks(
                {name: blocks[name] for name in wanted} | {"restored": 9 * exact}
            )

    made.embedding = RestoredKnows(parts[0].block_names(), chance)  # pyright: ignore
    without, with_view = made.validation({}), made.validation({}, generator=True)
    assert with_view["map_at_r"] == 1 > without["map_at_r"]
    assert with_view["global_map_at_r"] == without["global_map_at_r"]


def test_random_descriptors_score_at_chance_level(parts):
    """10 classes of 6 images: 5 of 59 others are positives; 1 of 10 catalogue images is."""
    results = table_of(parts, chance)
    row = results.variants["F"]
    mean = np.mean([row["leave_one_out"]["clean"]["recall_at_1"],
                    *(f["recall_at_1"] for c in row["leave_one_out"]["corruptions"].values()
                      for f in c.values())])  # fmt: skip
    assert mean == pytest.approx(5 / 59, abs=0.06)
    assert row["catalogue"]["clean"]["recall_at_8"] == pytest.approx(0.8, abs=0.15)
    assert evaluator(parts, chance).validation({})["recall_at_1"] < 0.5


def test_the_table_holds_every_corruption_and_its_means(parts):
    results = table_of(parts, chance)
    config = parts[1]
    groups = {"trained": config.data.corruptions, "held_back": held_back(config.data.corruptions)}
    assert sorted(sum(groups.values(), ())) == sorted(CORRUPTIONS)
    for row in results.variants.values():
        for protocol in ("leave_one_out", "catalogue"):
            found = row[protocol]["corruptions"]
            assert list(found) == list(CORRUPTIONS)
            assert all(list(each) == ["1", "5"] for each in found.values())
            for group, names in groups.items():
                for figure in ("recall_at_1", "map_at_r"):
                    values = [found[n][s][figure] for n in names for s in found[n]]
                    assert row[protocol][group][figure] == pytest.approx(np.mean(values))


def test_the_table_of_queries_has_the_means_of_the_rows(parts):
    results = table_of(parts, chance)
    columns = {name: np.array(values) for name, values in results.per_query.items()}
    lengths = {len(values) for values in columns.values()}
    assert lengths == {len(ROWS) * 2 * (60 + 12 * 2 * len(CORRUPTIONS))}
    for row in ("F", "fused"):
        for protocol in ("leave_one_out", "catalogue"):
            found = results.variants[row][protocol]
            first = found["clean"]["recall_at_1"]
            assert found["extra"]["cmc"][0] == pytest.approx(first)
            assert found["extra"]["pairs"]["auroc"] == pytest.approx(0.5, abs=0.1)
    assert "extra" not in results.variants["raw pixels"]["leave_one_out"]
    dataset = parts[2]
    label_of = dict(zip(dataset.test.ids, dataset.test.labels.tolist(), strict=True))
    assert all(label_of[q] == c for q, c in zip(columns["query"], columns["label"], strict=True))
    for row in ROWS:
        for protocol in ("leave_one_out", "catalogue"):
            mine = (columns["variant"] == row.name) & (columns["protocol"] == protocol)
            for corruption, severity, count in (("", 0, 60), ("stripes", 5, 12)):
                those = mine & (columns["corruption"] == corruption)
                those &= columns["severity"] == severity
                assert those.sum() == count == len(set(columns["query"][those]))
                figures = results.variants[row.name][protocol]
                figures = (
                    figures["corruptions"][corruption][str(severity)]
                    if corruption
                    else figures["clean"]
                )
                for name, value in figures.items():
                    assert columns[name][those].mean() == pytest.approx(value)


def test_an_evaluation_is_the_same_every_time(parts):
    first, second = table_of(parts, chance), table_of(parts, chance)
    assert first.variants == second.variants
    assert first.per_query == second.per_query


def test_queries_of_the_robustness_test_are_few_and_the_gallery_is_clean(parts):
    made = evaluator(parts, chance)
    made.test({}, {}, ROWS, lambda line: None)
    embedding = made.embedding
    assert isinstance(embedding, Fake)
    counts = {}
    for count, corruption in embedding.seen:
        counts.setdefault(corruption, set()).add(count)
    assert counts.pop(None) == {len(parts[2].test)}
    assert counts == {(c, s): {12} for c in CORRUPTIONS for s in (1, 5)}


def test_weights_are_chosen_on_validation_classes_alone(parts, monkeypatch):
    """The score sees clean queries and the trained corruptions of validation images."""
    made = evaluator(parts, oracle)
    monkeypatch.setattr("afa.evaluation.evaluator.costs", lambda *args: Costs(1.0, 1.0, 1.0))
    found = made.variants({}, {})
    embedding, config = made.embedding, parts[1]
    assert isinstance(embedding, Fake)
    once = [(30, None)] + [(12, (name, 3)) for name in config.data.corruptions]
    assert embedding.seen == 2 * once  # of the trained networks and of the initial weights
    assert [row.name for row in found] == [
        "raw pixels", "initial weights", "initial weights, fused", "F", "local", "flip alone",
        "F + flip", "G alone", "F + G", "D features alone", "query G", "query by discriminator",
        "query by confidence", "query by hand_made", "query by random", "fused",
    ]  # fmt: skip
    only_global = Fusion.of({"global": 1.0})
    # Nothing can be gained over the oracle's global view, so nothing is paid for.
    assert found[1:3] == [
        Variant("initial weights", "initial", only_global, 1.0),
        Variant("initial weights, fused", "initial", only_global, 1.0),
    ]
    assert found[-1] == Variant("fused", "trained", only_global, 1.0)


def test_initial_weights_are_fused_by_their_own_score(parts):
    """Each kind of row is scored by its own networks, and a second view is paid for."""
    costs = Costs(1.0, 1.0, 1.0)
    found = variants.build_variants(
        parts[0],
        lambda fusion: dict(fusion.weights).get("local", 0.0),
        lambda fusion: dict(fusion.weights).get("flip", 0.0),
        lambda judge, view, share: 0.0,
        costs,
        limit=0.0,
    )
    rows = {row.name: row for row in found}
    best = max(GRID)
    assert rows["initial weights, fused"] == Variant(
        "initial weights, fused", "initial", Fusion.of({"global": 1.0, "flip": best}), 2.0
    )
    assert rows["fused"].fusion == Fusion.of({"global": 1.0, "local": best})


def test_few_validation_queries_are_both_queries_and_gallery(parts):
    networks, config, dataset = parts
    few = with_changes(config, **{"evaluation.validation_queries": 10})
    made = evaluator((networks, few, dataset), oracle)
    assert made.validation({})["recall_at_1"] == 1
    assert made.embedding.seen == [(10, None)]  # pyright: ignore[reportAttributeAccessIssue]


# ---- descriptors ---------------------------------------------------------------------------------


def test_raw_pixel_descriptors_ignore_brightness(parts):
    config = with_changes(parts[1], **{"evaluation.batch_size": 4})
    rng = np.random.default_rng(0)
    pattern = rng.integers(60, 120, (16, 16, 3))
    shades = [pattern, pattern + 100, rng.integers(0, 256, (16, 16, 3)), np.full((16, 16, 3), 7)]
    images = [each.astype(np.uint8) for each in shades * 2][:6]
    images = ImageSet(images, np.arange(6), tuple("abcdef"), np.zeros(6, bool))
    rows = pixels(images, config.data, config.evaluation).blocks["pixels"]
    assert rows.shape == (6, 16 * 16 * 3)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    similarity = rows @ rows.T
    assert similarity[0, 1] == pytest.approx(1, abs=1e-3)
    assert abs(similarity[0, 2]) < 0.3
    np.testing.assert_allclose(similarity[:2, 4:].diagonal(), 1, atol=1e-3)
    corrupted = pixels(images, config.data, config.evaluation, ("gaussian_noise", 5)).blocks[
        "pixels"
    ]
    assert corrupted[0] @ rows[0] < 0.99
    again = pixels(
        images.subset(np.array([0])), config.data, config.evaluation, ("gaussian_noise", 5)
    )
    np.testing.assert_array_equal(again.blocks["pixels"][0], corrupted[0])


def test_descriptors_do_not_depend_on_the_batch(parts):
    """Any batch size, also one that leaves a rest, embeds an image the same way."""
    images = image_set(3, 3, side=16)

    def mean_and_first(variables, batch):
        return {"mean": batch.astype("float32").mean((1, 2, 3)), "first": batch[:, 0, 0, 0]}

    found = []
    for size in (1, 5, 12, 64):
        config = with_changes(parts[1], **{"evaluation.batch_size": size})
        made = Embedding(parts[0], config.backbone.name, config.data, config.evaluation)
        found.append(made._over(mean_and_first, SimpleNamespace(), images, None))
    for each in found:
        assert each["mean"].shape == (12,)
        for name, values in each.items():
            np.testing.assert_array_equal(values, found[0][name])


def test_rows_and_weights_of_descriptors():
    rng = np.random.default_rng(0)
    blocks = {name: unit_rows(rng, 5) for name in ("a", "b")}
    embedded = DescriptorBlocks(blocks)
    some = embedded.rows(np.array([4, 1]))
    np.testing.assert_array_equal(some.blocks["a"], blocks["a"][[4, 1]])
    np.testing.assert_allclose(embedded.fused(Fusion.of({"a": 1.0})), blocks["a"], atol=1e-6)
    both = Fusion.of({"a": 1.0, "b": 0.5})
    fused = embedded.fused(both)
    assert fused.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.sum(fused[:, 4:] ** 2, axis=1), 0.5 / 1.5, atol=1e-4)
    np.testing.assert_allclose(some.fused(both), fused[[4, 1]], atol=1e-6)


def unit_rows(rng, count):
    rows = rng.normal(size=(count, 4)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
