"""Re-rankers against direct implementations of their definitions, and on manifolds."""

import itertools
import json

import jax
import numpy as np
import pytest

from afa.data.types import ImageSet
from afa.errors import UserError
from afa.evaluation import reranking
from afa.evaluation.protocols import drawn_evenly, protocols
from afa.models.heads import LocalFeatures
from afa.retrieval import rerank
from afa.retrieval.exact import normalise
from afa.retrieval.rerank import contract, diffusion, expansion, reciprocal, whitening
from afa.retrieval.rerank.posterior import class_agreement
from experiments import rerank as command


def unit(seed, *shape):
    return normalise(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def arcs(each=40, classes=4):
    """Classes along arcs of the sphere, whose ends are far from each other."""
    draw = np.random.default_rng(5)
    rows, labels = [], np.repeat(np.arange(classes), each)
    for c in range(classes):
        angle = np.linspace(0, 0.9 * np.pi, each)
        around = 2 * np.pi * c / classes
        rows.append(
            np.stack(
                [
                    np.cos(angle),
                    np.sin(angle) * np.cos(around),
                    np.sin(angle) * np.sin(around),
                    np.full(each, 0.35 * c),
                ],
                axis=1,
            )
        )
    points = np.concatenate(rows) + draw.normal(size=(each * classes, 4)) * 0.02
    return normalise(points.astype(np.float32)), labels


def images(labels):
    count = len(labels)
    return ImageSet(
        [b""] * count, labels, tuple(str(i) for i in range(count)), np.zeros(count, bool)
    )


def split_of(vectors, labels):
    return reranking.Split(images(labels), contract.ImageFeatures.of(vectors))


VECTOR_METHODS = ("plain", *reranking.WHITENING, *list(rerank.METHODS)[1:])
GALLERY, QUERIES = unit(0, 30, 6), unit(1, 4, 6)
OUTSIDE = np.full(4, -1)


def test_plain_is_the_similarity():
    score = rerank.METHODS["plain"].reranker(GALLERY)
    np.testing.assert_array_equal(score(QUERIES, OUTSIDE), QUERIES @ GALLERY.T)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_query_expansion_by_hand(alpha):
    score = expansion.query_expansion(GALLERY, results=2, alpha=alpha)
    for query, found in zip(QUERIES, score(QUERIES, OUTSIDE), strict=True):
        similarity = GALLERY @ query
        best = np.argsort(-similarity)[:2]
        mean = query + sum(similarity[i] ** alpha * GALLERY[i] for i in best)
        np.testing.assert_allclose(found, GALLERY @ (mean / np.linalg.norm(mean)), atol=1e-5)


def test_query_expansion_leaves_out_the_query_itself():
    score = expansion.query_expansion(GALLERY, results=1)
    found = score(GALLERY[:3], np.arange(3))
    for row in range(3):
        similarity = GALLERY @ GALLERY[row]
        similarity[row] = -1
        mean = GALLERY[row] + GALLERY[similarity.argmax()]
        np.testing.assert_allclose(found[row], GALLERY @ (mean / np.linalg.norm(mean)), atol=1e-5)


def test_database_augmentation_by_hand():
    score = expansion.database_augmentation(GALLERY, results=2, alpha=1.0)
    augmented = []
    for row, vector in enumerate(GALLERY):
        similarity = GALLERY @ vector
        similarity[row] = -1
        best = np.argsort(-similarity)[:2]
        mean = vector + sum(max(similarity[i], 0) * GALLERY[i] for i in best)
        augmented.append(mean / np.linalg.norm(mean))
    expected = QUERIES @ np.array(augmented).T
    np.testing.assert_allclose(score(QUERIES, OUTSIDE), expected, atol=1e-5)
    twice = expansion.both(GALLERY, results=2, alpha=1.0)(QUERIES, OUTSIDE)
    again = expansion.query_expansion(np.array(augmented, np.float32), results=2, alpha=1.0)
    np.testing.assert_allclose(twice, again(QUERIES, OUTSIDE), atol=1e-5)


# ---- diffusion ---------------------------------------------------------------------------------


def test_the_graph_joins_mutual_neighbours():
    graph = diffusion.normalised_graph(GALLERY, 5, 3.0).toarray()
    similarity = GALLERY @ GALLERY.T
    np.fill_diagonal(similarity, -1)
    near = similarity >= np.sort(similarity, axis=1)[:, -5:-4]
    weights = np.where(near & near.T, np.maximum(similarity, 0) ** 3, 0)
    degree = np.maximum(weights.sum(axis=1), 1e-12)
    expected = weights / np.sqrt(degree[:, None] * degree[None])
    np.testing.assert_allclose(graph, expected, atol=1e-5)


def test_conjugate_gradients_solve_the_system():
    matrix = 0.99 * diffusion.normalised_graph(GALLERY, 5, 3.0)
    right = np.random.default_rng(2).random((30, 3))
    right[:, 2] = 0
    expected = np.linalg.solve(np.eye(30) - matrix.toarray(), right)
    np.testing.assert_allclose(diffusion.solve(matrix, right), expected, atol=1e-4)


def test_unreachable_rows_keep_their_order():
    vectors = np.concatenate([np.tile(unit(3, 1, 8), (6, 1)), unit(4, 20, 8)])
    vectors = normalise(vectors + 0.01 * unit(5, 26, 8))
    found = diffusion.diffuse(vectors, graph=3, results=1)(vectors[:1], np.zeros(1, int))[0]
    reached = found > 1e-3
    rest = np.flatnonzero(~reached)
    assert reached[1:6].any()
    assert len(rest) > 5
    order = rest[np.argsort(-found[rest])]
    similarity = vectors[order] @ vectors[0]
    assert np.all(np.diff(similarity) <= 1e-6)


# ---- k-reciprocal ------------------------------------------------------------------------------


def slow_k_reciprocal(gallery, query, k1, k2, plain):
    """The paper's equations with sets and loops."""
    count = len(gallery)
    similarity = gallery @ gallery.T
    np.fill_diagonal(similarity, -9)
    order = np.argsort(-similarity, axis=1)

    def mutual(row, k):
        return {int(j) for j in order[row, :k] if row in order[j, :k]}

    def joined(members):
        extra = set()
        for member in members:
            half = mutual(member, -(-k1 // 2)) | {member}
            if len(members & half) >= 2 / 3 * len(half):
                extra |= half
        return members | extra

    def code(vector, members):
        out = np.zeros(count)
        for j in joined(members):
            out[j] = np.exp(-np.sum((gallery[j] - vector) ** 2))
        return out

    raw = [code(gallery[i], mutual(i, k1) | {i}) for i in range(count)]
    codes = []
    for i in range(count):
        total = raw[i] + sum(raw[j] for j in order[i, : k2 - 1])
        codes.append(total / total.sum())
    to_query = gallery @ query
    best = np.argsort(-to_query)[:k1]
    members = {int(j) for j in best if to_query[j] >= similarity[j, order[j, k1 - 1]]}
    own = code(query, members) + sum(codes[j] for j in best[: k2 - 1])
    own = own / max(own.sum(), 1e-12)
    jaccard = [np.minimum(own, c).sum() / np.maximum(own, c).sum() for c in codes]
    return (1 - plain) * np.array(jaccard) + plain * to_query


@pytest.mark.parametrize(("k1", "k2"), [(6, 1), (7, 3)])
def test_k_reciprocal_by_its_definition(k1, k2):
    score = reciprocal.k_reciprocal(GALLERY, k1=k1, k2=k2, plain=0.3)
    found = score(QUERIES, OUTSIDE)
    for query, line in zip(QUERIES, found, strict=True):
        expected = slow_k_reciprocal(GALLERY, query, k1, k2, 0.3)
        np.testing.assert_allclose(line, expected, atol=1e-4)


# ---- whitening ---------------------------------------------------------------------------------


def test_pca_whitening_makes_directions_equal():
    vectors = normalise(unit(6, 400, 8) * np.linspace(1, 0.2, 8, dtype=np.float32))
    found = whitening.pca_whitening(vectors, 5, 1e-6)
    turned = (vectors - found.mean) @ found.matrix
    np.testing.assert_allclose(np.cov(turned.T, bias=True), np.eye(5), atol=1e-2)
    assert found(vectors).shape == (400, 5)
    np.testing.assert_allclose(np.linalg.norm(found(vectors), axis=1), 1, atol=1e-5)


def test_learned_whitening_scales_away_what_differs_within_classes():
    draw = np.random.default_rng(7)
    labels = np.repeat(np.arange(40), 10)
    noise = draw.normal(size=(400, 6)) * [3, 1, 1, 0.3, 0.3, 0.3]
    vectors = normalise((2 * draw.normal(size=(40, 6))[labels] + noise).astype(np.float32))
    found = whitening.learned_whitening(vectors, labels, 6, 1e-6)
    turned = (vectors - found.mean) @ found.matrix
    means = np.stack([turned[labels == c].mean(axis=0) for c in range(40)])
    within = turned - means[labels]
    np.testing.assert_allclose(within.T @ within / 400, np.eye(6), atol=2e-2)
    between = np.var(means, axis=0)
    assert np.all(np.diff(between) < 0)  # the most discriminative directions come first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: whitening.pca_whitening(v, 9, 0.1), "dimension=9 is not between 1 and 6"),
        (lambda v: whitening.pca_whitening(v, 2, 0.0), r"shrinkage=0.0 must lie in \(0, 1\]"),
        (lambda v: whitening.learned_whitening(v, np.arange(30), 2, 0.1), "at least 2 images"),
        (lambda v: whitening.learned_whitening(v, np.zeros(3, int), 2, 0.1), "labels has 3"),
        (lambda v: whitening.pca_whitening(2 * v, 2, 0.1), "unit"),
    ],
)
def test_invalid_whitening_arguments_are_errors(call, message):
    with pytest.raises(UserError, match=message):
        call(GALLERY)


# ---- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rerank.METHODS)
def test_every_setting_gives_finite_scores(name):
    method = rerank.METHODS[name]
    for settings in method.settings():
        score = method.reranker(GALLERY, **settings)
        for queries, exclude in ((QUERIES, OUTSIDE), (GALLERY[:4], np.arange(4))):
            found = score(queries, exclude)
            assert found.shape == (4, 30)
            assert np.isfinite(found).all()


@pytest.mark.parametrize("name", rerank.METHODS)
def test_a_gallery_smaller_than_the_settings(name):
    method = rerank.METHODS[name]
    for settings in method.settings():
        found = method.reranker(GALLERY[:3], **settings)(GALLERY[:1], np.zeros(1, int))
        assert np.isfinite(found).all()


def test_neighbours_are_limited_by_the_gallery():
    assert contract.own_neighbours(GALLERY[:4], 9)[1].shape == (4, 3)
    assert contract.neighbours(QUERIES, GALLERY[:4], 9)[1].shape == (4, 4)


def test_manifold_methods_beat_the_similarity():
    vectors, labels = arcs()
    split = split_of(vectors, labels)
    protocol = protocols(split.images, "halves")[0]

    def figure(reranker, settings):
        found = reranking.measure(contract.of_vectors(reranker), settings, split, protocol)[0]
        return found.means["map_at_r"]

    plain = figure(rerank.plain, {})
    for name, least in {
        "diffusion": 0.15,
        "k-reciprocal": 0.01,
        "database augmentation": 0,
    }.items():
        method = rerank.METHODS[name]
        best = max(figure(method.reranker, each) for each in method.settings())
        assert best > plain + least, name


def test_the_study_chooses_on_validation_and_measures_on_test():
    vectors, labels = arcs()
    order = np.random.default_rng(0).permutation(len(labels))
    parts = np.array_split(order, 3)
    names = ("train", "validation", "test")
    splits = {
        name: split_of(vectors[np.sort(part)], labels[np.sort(part)])
        for name, part in zip(names, parts, strict=True)
    }
    notes = []
    lines = reranking.study(splits, "halves", notes.append, VECTOR_METHODS)
    assert tuple(line.method for line in lines) == VECTOR_METHODS
    assert len(lines) == len(notes) == len(rerank.METHODS) + 2
    assert (lines[0].gain.mean, lines[0].p) == (0, 1)
    plain = lines[0].metrics.means["map_at_r"]
    for line in lines:
        assert line.metrics.means["map_at_r"] - plain == pytest.approx(line.gain.mean)
        assert line.gain.low <= line.gain.mean <= line.gain.high
        assert line.milliseconds > 0
    # The choice does not depend on the test classes.
    other = unit(8, len(parts[2]), 4), labels[np.sort(parts[2])]
    splits["test"] = split_of(*other)
    again = reranking.study(splits, "halves", notes.append, VECTOR_METHODS)
    for line, repeated in zip(lines, again, strict=True):
        assert (repeated.settings, repeated.validation) == (line.settings, line.validation)
    assert again[0].metrics.means != lines[0].metrics.means


def known(labels, seed, classes=5):
    """All features of images, at random around the centres of their classes."""
    count, draw = len(labels), np.random.default_rng(seed)
    vectors = normalise(np.eye(16, dtype=np.float32)[labels] + 2 * unit(seed, count, 16))
    shares = draw.dirichlet(np.ones(classes), count).astype(np.float32)

    def local_features(of):
        descriptor = np.stack([unit(100 * of + int(each), 12, 8) for each in labels])
        position = np.stack([np.random.default_rng(int(c)).random((12, 2)) for c in labels])
        strength = np.full((count, 12), 1 / 12, np.float32)
        return LocalFeatures(strength, position.astype(np.float32), descriptor)

    several = {
        key: normalise(vectors + 0.2 * unit(seed + i, count, 16))
        for i, key in enumerate(itertools.product(reranking.SCALES, reranking.POWERS))
    }
    return contract.ImageFeatures(
        vectors, shares, {1.0: local_features(0), 2.0: local_features(1)}, several
    )


def full_splits(test_seed=3):
    """Splits with all features, for all methods."""
    spent = {reranking.DESCRIPTOR: 1.0, 1.0: 10.0, 2.0: 20.0}
    spent |= dict.fromkeys(itertools.product(reranking.SCALES, reranking.POWERS), 100.0)
    labels = np.repeat(np.arange(6), 5)
    return {
        name: reranking.Split(images(labels), known(labels, seed), spent)
        for name, seed in (("train", 1), ("validation", 2), ("test", test_seed))
    }


def test_settings_of_every_method_are_chosen_on_validation():
    lines = reranking.study(full_splits(), "halves", lambda text: None)
    assert tuple(line.method for line in lines) == reranking.NAMES
    again = reranking.study(full_splits(test_seed=9), "halves", lambda text: None)
    by_name = {line.method: line for line in lines}
    for line, repeated in zip(lines, again, strict=True):
        assert (repeated.settings, repeated.validation) == (line.settings, line.validation)
    for name in ("plain", "diffusion", "class posterior", "learned whitening"):
        assert by_name[name].embed_milliseconds == 1
    assert by_name["multi-scale"].embed_milliseconds == 100
    for name in reranking.LOCAL:
        line = by_name[name]
        assert line.embed_milliseconds == 1 + 10 * line.settings["scale"]
        assert line.gain.mean > 0.05  # images of a class have equal local features here


def test_a_subset_of_queries_is_searched_in_the_full_gallery():
    """The metrics of a query do not depend on the other queries."""
    splits = full_splits()
    full, few = (
        reranking.study(splits, "halves", lambda text: None, ("plain",), queries)[0].metrics
        for queries in (0, 8)
    )
    assert (full.queries, few.queries) == (12, 8)
    test = splits["test"].images
    queries = protocols(test, "halves")[0].queries
    subset = np.searchsorted(queries, drawn_evenly(test, queries, 8, seed=0))
    for name, values in few.per_query.items():
        np.testing.assert_array_equal(values, full.per_query[name][subset])


def test_half_of_every_class_is_searched_among_the_other_half():
    test = images(np.repeat([3, 5, 9], [4, 5, 1]))
    protocol = protocols(test, "halves")[0]
    assert sorted([*protocol.queries, *protocol.gallery]) == list(range(10))
    assert test.labels[protocol.queries].tolist() == [3, 3, 5, 5]
    assert test.labels[protocol.gallery].tolist() == [3, 3, 5, 5, 5, 9]
    assert (protocol.exclude == -1).all()
    np.testing.assert_array_equal(protocols(test, "halves")[0].queries, protocol.queries)


@pytest.mark.parametrize("name", reranking.NAMES)
def test_queries_are_not_used_to_prepare_the_gallery(name):
    """The prepared gallery, and so the scores of a fixed query, do not depend on the rows of the
    queries. With leave-one-out they would."""
    splits = full_splits()
    test, train = splits["test"], splits["train"]
    candidate = reranking._candidates(train)[name]
    settings = dict(candidate.settings[0])
    assert reranking.supported_protocols(test.images) == ["halves"]
    protocol = protocols(test.images, "halves")[0]
    queries = test.known.rows(protocol.queries[:3])
    other = known(test.images.labels, 77).rows(protocol.queries)

    def replaced(rows, fresh):
        rows = np.array(rows)
        rows[protocol.queries] = fresh
        return rows

    moved = jax.tree.map(replaced, _parts(test.known), _parts(other))
    found = [
        candidate.reranker(known_of.rows(protocol.gallery), **settings)(queries, np.full(3, -1))
        for known_of in (test.known, contract.ImageFeatures(*moved))
    ]
    np.testing.assert_array_equal(found[0], found[1])


def _parts(of):
    return of.vectors, of.posterior, dict(of.local_features), dict(of.multi_scale)


def test_the_best_weight_of_the_evidence_is_chosen():
    split = full_splits()["validation"]
    protocol = protocols(split.images, "halves")[0]
    candidate = reranking.Candidate(class_agreement, [{}], (3.0, 0.3, 0.03))
    figure, settings = reranking.choice(candidate, split, protocol)
    found = {
        weight: reranking.measure(
            reranking.added_to_similarity(class_agreement), {"weight": weight}, split, protocol
        )[0].means["map_at_r"]
        for weight in candidate.weights
    }
    assert len(set(found.values())) == 3
    assert figure == pytest.approx(max(found.values()))
    assert found[settings["weight"]] == max(found.values())


def test_evidence_is_added_to_the_similarity():
    images = known(np.repeat(np.arange(3), 2), 4)
    score = reranking.added_to_similarity(class_agreement)(images, weight=0.5)
    found = score(images.rows(slice(2)), np.arange(2))
    similarity = images.vectors[:2] @ images.vectors.T
    agreement = images.posterior[:2] @ images.posterior.T
    np.testing.assert_allclose(found, similarity + 0.5 * agreement, atol=1e-5)


def test_methods_are_chosen_by_name():
    words = [reranking.word(name) for name in reranking.NAMES]
    assert all(each.replace("_", "").isalnum() and each.islower() for each in words)
    assert reranking.chosen(words) == reranking.NAMES
    assert reranking.chosen(["diffusion", "k_reciprocal"]) == ("plain", "k-reciprocal", "diffusion")


def test_the_command_writes_the_table(tiny_copy, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["--run", str(tiny_copy), "--out", str(out)]
    assert command.main([*words, "--protocol=catalogue"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["lines"][0]["method"] == "plain"
    assert all(line["method"] in printed for line in found["lines"])
    run = json.loads((tiny_copy / "result.json").read_text())["metrics"]["test"]
    expected = run["fused"]["catalogue"]["clean"]["map_at_r"]
    assert found["lines"][0]["metrics"]["map_at_r"] == pytest.approx(expected, abs=1e-6)


def test_the_command_measures_the_named_methods(tiny_finished, tmp_path, capsys, monkeypatch):
    seen, embed_split = [], reranking.embed_split
    monkeypatch.setattr(
        reranking, "embed_split", lambda *given: seen.append(given) or embed_split(*given)
    )
    out = tmp_path / "out.json"
    words = ["--run", str(tiny_finished), "--out", str(out)]
    assert command.main([*words, "--methods=class_posterior", "--scales=1,2"]) == 0
    printed = capsys.readouterr()
    found = json.loads(out.read_text())
    assert found["protocol"] == "halves"
    assert [line["method"] for line in found["lines"]] == ["plain", "class posterior"]
    assert "train images" not in printed.err  # only whitening is fitted
    assert "weight" in printed.out
    assert [given[-2:] for given in seen] == [(("plain", "class posterior"), (1.0, 2.0))] * 2


def test_errors_of_the_command(tiny_finished, tmp_path, capsys):
    assert command.main(["--run", str(tmp_path)]) == 2
    assert "contains no run" in capsys.readouterr().err
    words = ["--run", str(tiny_finished)]
    assert command.main([*words, "--methods=plain,difusion"]) == 2
    assert "methods='difusion' is unknown; did you mean 'diffusion'?" in capsys.readouterr().err
    assert command.main([*words, "--queries=-1"]) == 2
    assert "--queries=-1 must not be negative" in capsys.readouterr().err
    for scales in ("1,x", "0", "99", ""):
        assert command.main([*words, f"--scales={scales}"]) == 2
        assert "numbers above 0 and up to 8" in capsys.readouterr().err
    assert command.main([*words, "--out", str(tmp_path / "no" / "x")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert command.main([*words, "--protocol", "other"]) == 2
    assert "--protocol" in capsys.readouterr().err
    assert command.main([*words, "--protocol", "query_gallery"]) == 2
    assert "the test split supports halves, catalogue" in capsys.readouterr().err
