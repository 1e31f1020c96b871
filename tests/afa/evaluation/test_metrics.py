"""Metrics against reference values: hand calculation and two public evaluators (tests/data)."""

import json

import numpy as np
import pytest
from paths import METRICS
from reference_figures import FIGURES

from afa.errors import UserError
from afa.evaluation.metrics import landmarks
from afa.evaluation.metrics import retrieval as metrics
from afa.evaluation.metrics.retrieval import Ranked
from afa.evaluation.metrics.ties import Tied

TOLERANCE = 1e-6


def case(name):
    return json.loads((METRICS / f"{name}.json").read_text())


def near(value, expected):
    np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCE)


CUT_FIGURES = {
    "recall": metrics.recall_at_k,
    "precision": metrics.precision_at_k,
    "coverage": metrics.coverage_at_k,
    "map": metrics.map_at_k,
}


def figure(name, ranked):
    if name in FIGURES:
        return FIGURES[name](ranked)
    kind, cut = name.split("_at_")
    return CUT_FIGURES[kind](ranked, int(cut))


# ---- embeddings: labels decide what is right ---------------------------------------------------


def embedded(name):
    """Scores (minus the squared distance), positives and junk of a case with embeddings."""
    given = case(f"embeddings_{name}")
    query, gallery = (np.array(given[key], np.float32) for key in ("query", "gallery"))
    labels, gallery_labels = (
        np.array(given[key], np.int64) for key in ("query_labels", "gallery_labels")
    )
    scores = -np.square(query[:, None] - gallery[None]).sum(axis=2)
    junk = np.array(given["exclude"])[:, None] == np.arange(len(gallery))
    return given, scores, (labels[:, None] == gallery_labels) & ~junk, junk


EMBEDDED = sorted(path.stem.removeprefix("embeddings_") for path in METRICS.glob("embeddings_*"))


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_give_the_reference_figures(name):
    given, scores, positives, junk = embedded(name)
    ranked = Ranked.from_scores(scores, positives, junk)
    figures = metrics.metrics_from_ranks(ranked.ranks, ks=(1, 2))
    assert len(given["figures"]) > 5
    for key, expected in given["figures"].items():
        if key == "queries":
            assert figures.queries == expected
        elif key == "scored":
            assert figures.scored == expected == figures.queries - figures.left_out
        elif key == "precision_at_1_over_ties":
            near(Tied.from_scores(scores, positives, junk).recall_at_k(1).mean(), expected)
        else:
            near(metrics.scored_mean(figure(key, ranked)), expected)
        if key in figures.means:
            near(figures.means[key], expected)
    for key, wrong in given.get("wrong", {}).items():
        assert abs(metrics.scored_mean(figure(key, ranked)) - wrong) > 0.01


def test_mean_over_classes():
    given, scores, positives, junk = embedded("longtail")
    ranked = Ranked.from_scores(scores, positives, junk)
    labels = np.array(given["query_labels"])
    assert len(given["class_means"]) == 5
    for key, expected in given["class_means"].items():
        near(metrics.class_mean(figure(key, ranked), labels), expected)


def test_ties_do_not_move_the_average_where_none_decides():
    _, scores, positives, junk = embedded("balanced")
    ranked = Ranked.from_scores(scores, positives, junk)
    averaged = Tied.from_scores(scores, positives, junk).recall_at_k(1)
    near(averaged, metrics.recall_at_k(ranked, 1))


def test_a_query_without_positives_is_left_out_not_zero():
    _, scores, positives, _ = embedded("missing_class")
    figures = metrics.metrics_of(Ranked.from_scores(scores, positives))
    assert (figures.queries, figures.scored, figures.left_out) == (8, 6, 2)
    blank = ~positives.any(axis=1)
    assert blank.sum() == 2
    for values in figures.per_query.values():
        np.testing.assert_array_equal(np.isnan(values), blank)
    averaged = Tied.from_scores(scores, positives).recall_at_k(1)
    np.testing.assert_array_equal(np.isnan(averaged), blank)


def test_no_query_with_a_positive_is_an_error():
    with pytest.raises(UserError, match="none of the 3 queries has a positive in the gallery"):
        metrics.metrics_from_ranks(np.full((3, 2), -1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = value
    positives = np.ones((3, 4), bool)
    message = r"scores: 1 of 3 rows hold NaN or infinity \(first: row 1\)"
    with pytest.raises(UserError, match=message):
        Ranked.from_scores(scores, positives)


# ---- lists -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", case("hand_lists"))
def test_hand_checked_lists(given):
    relevance = np.array(given["relevance"])
    hits = np.flatnonzero(relevance).tolist()
    missing = [f"missing {i}" for i in range(given["relevant"] - len(hits))]
    ranked = Ranked.from_lists([np.arange(len(relevance))], [hits + missing])
    assert len(given["figures"]) == 10
    for name, expected in given["figures"].items():
        near(figure(name, ranked), [expected])


def test_average_precision_divides_by_all_positives():
    given = case("average_precision")
    ranked = Ranked(np.array([given["ranks"]]), np.array([given["relevant"]]))
    near(metrics.average_precision_trapezoid(ranked), [given["trapezoid"]])
    near(metrics.average_precision(ranked), [given["finite_sum"]])
    found_only = Ranked(ranked.ranks, np.array([len(given["ranks"])]))
    near(metrics.average_precision_trapezoid(found_only), [given["wrong"]])


def test_a_list_too_short_is_refused():
    _, scores, positives, junk = embedded("many_positives")
    neighbours = np.argsort(-np.where(junk, -np.inf, scores), axis=1)[:, :3]
    cut = Ranked.from_lists(list(neighbours), [np.flatnonzero(row).tolist() for row in positives])
    near(metrics.recall_at_k(cut, 1).mean(), 0.5694444444444444)
    for name, needed in [
        ("map_at_r", "MAP@R needs the first 11"),
        ("r_precision", "R-precision needs the first 11"),
        ("recall_at_4", "Recall@4 needs the first 4"),
        ("precision_at_4", "precision@4 needs the first 4"),
        ("coverage_at_4", "coverage@4 needs the first 4"),
    ]:
        with pytest.raises(UserError, match=f"{needed} results of query 0, but its list holds 3"):
            figure(name, cut)
    with pytest.raises(UserError, match="Recall@4 needs the first 4"):
        metrics.metrics_of(cut)


def test_a_gallery_smaller_than_the_cut_is_no_short_list():
    ranked = Ranked.from_lists([np.array([2, 0])], [[0]], [[2]], complete=True)
    near(metrics.metrics_of(ranked).per_query["recall_at_8"], [1.0])


def test_a_result_named_twice_counts_once_and_keeps_its_place():
    ranked = Ranked.from_lists([np.array(["x", "y", "x", "z"])], [["x", "z"]])
    assert ranked.ranks.tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("ranks", "relevant", "depth", "message"),
    [
        ([[3, 1]], [2], None, "must ascend"),
        ([[1, 1]], [2], None, "must ascend"),
        ([[-1, 1]], [2], None, "must ascend"),
        ([[-2]], [2], None, "a rank is -2"),
        ([[0, 1]], [1], None, "more positives in its list than in the gallery"),
        ([[0, 5]], [2], [5], "beyond the end of its list"),
    ],
)
def test_malformed_ranks_are_refused(ranks, relevant, depth, message):
    with pytest.raises(UserError, match=message):
        Ranked(np.array(ranks), np.array(relevant), None if depth is None else np.array(depth))


def test_blocks_of_queries_are_ranked_as_the_whole_table(monkeypatch):
    rng = np.random.default_rng(0)
    queries, gallery = (rng.normal(size=(n, 8)).astype(np.float32) for n in (9, 40))
    positives = [rng.choice(40, rng.integers(0, 6), replace=False) for _ in range(9)]
    junk = [rng.choice(40, 5, replace=False) for _ in range(9)]
    right, skipped = np.zeros((9, 40), bool), np.zeros((9, 40), bool)
    for i in range(9):
        right[i, positives[i]], skipped[i, junk[i]] = True, True
    whole = Ranked.from_scores(queries @ gallery.T, right, skipped)
    for block in (1, 100, 2**24):
        found = Ranked.from_vectors(queries, gallery, positives, junk, block)
        np.testing.assert_array_equal(found.ranks, whole.ranks)
        np.testing.assert_array_equal(found.relevant, whole.relevant)
    shapes, made = [], Ranked.from_scores
    monkeypatch.setattr(Ranked, "from_scores", lambda s, *m: shapes.append(s.shape) or made(s, *m))
    Ranked.from_vectors(queries, gallery, positives, junk, block=100)
    assert shapes == [(2, 40)] * 4 + [(1, 40)]
    plain = Ranked.from_vectors(queries, gallery, positives)
    np.testing.assert_array_equal(plain.relevant, right.sum(axis=1))
    with pytest.raises(UserError, match="only rankings of the whole gallery can be joined"):
        Ranked.joined([Ranked(np.array([[0]]), np.array([1]), np.array([3]))])


# ---- landmark protocols ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "hand", "cutoff", "cut"])
def test_revisited_difficulties(name):
    given = case(f"revisited_{name}")
    parts = {
        key: [np.array(row, np.int64) for row in given[key]]
        for key in ("neighbours", "easy", "hard", "junk")
    }
    neighbours = parts.pop("neighbours")
    ranked = {
        level: Ranked.from_lists(neighbours, *truth)
        for level, truth in landmarks.difficulties(**parts).items()
    }
    assert set(given["figures"]) >= {"easy", "medium"}
    for level, expected in given["figures"].items():
        precision = metrics.average_precision_trapezoid(ranked[level])
        near(precision, expected["ap"])
        near(metrics.scored_mean(precision), expected["map"])
        cuts = [metrics.precision_to_last(ranked[level], k).mean() for k in (1, 5, 10)]
        near(cuts, expected["precision"])
    if "scores" in given:
        order = np.argsort(-np.array(given["scores"]), axis=1, kind="stable")
        np.testing.assert_array_equal(order, given["neighbours"])


def test_junk_that_counts_as_wrong_would_give_another_figure():
    given = case("revisited_random")
    neighbours, *judged = (
        [np.array(row, np.int64) for row in given[key]]
        for key in ("neighbours", "easy", "hard", "junk")
    )
    positives, _ = landmarks.difficulties(*judged)["medium"]
    careless = metrics.average_precision_trapezoid(Ranked.from_lists(neighbours, positives))
    near(metrics.scored_mean(careless), 0.24243319267338861)
    assert abs(metrics.scored_mean(careless) - given["figures"]["medium"]["map"]) > 0.01


def test_a_cut_list_without_any_positive_scores_zero():
    given = case("revisited_cut")
    neighbours, *judged = (
        [np.array(row, np.int64) for row in given[key]]
        for key in ("neighbours", "easy", "hard", "junk")
    )
    hard = Ranked.from_lists(neighbours, *landmarks.difficulties(*judged)["hard"])
    empty = ~hard.found.any(axis=1)
    assert empty.sum() == 2
    for values in (
        metrics.average_precision_trapezoid(hard),
        metrics.precision_to_last(hard, 5),
        metrics.reciprocal_rank(hard),
    ):
        assert values[empty].tolist() == [0.0, 0.0]
        assert np.all(values[~empty] > 0)


def test_landmark_retrieval():
    given = case("landmarks")["retrieval"]
    for cut, expected in ((100, given["map_at_100"]), (1, given["map_at_1"])):
        found = landmarks.landmark_precision(given["answers"], given["solution"], cut)
        near(metrics.scored_mean(found), expected)


def test_landmark_recognition():
    given = case("landmarks")["recognition"]
    answers, solution = given["answers"], given["solution"]
    confidence = np.array([score for _, score in answers.values()])
    correct = np.array([answer in solution[key] for key, (answer, _) in answers.items()])
    shown = sum(bool(right) for right in solution.values())
    near(landmarks.global_average_precision(confidence, correct, shown), given["gap"])
    with pytest.raises(UserError, match="3 predictions are correct, but only 2 images show"):
        landmarks.global_average_precision(confidence, correct, 2)
    with pytest.raises(UserError, match="confidence: 1 of 5 rows"):
        landmarks.global_average_precision(confidence * [1, np.nan, 1, 1, 1], correct, shown)


# ---- cumulative matches ------------------------------------------------------------------------


def test_cumulative_matches_count_the_first_positive_of_each_query():
    ranks = np.array([[0, 3], [2, -1], [5, 6], [-1, -1]])
    ranked = Ranked(ranks, np.array([2, 1, 2, 0]))  # the last query has nothing to find
    near(metrics.cumulative_match(ranked, 4), [1 / 3, 1 / 3, 2 / 3, 2 / 3])
    for cut in (1, 3, 6):
        expected = metrics.scored_mean(metrics.recall_at_k(ranked, cut))
        near(metrics.cumulative_match(ranked, 6)[cut - 1], expected)


def test_cumulative_matches_refuse_short_lists_and_queries_with_nothing_to_find():
    short = Ranked(np.array([[0]]), np.array([1]), np.array([3]))
    with pytest.raises(UserError, match="CMC to rank 4 needs the first 4 results of query 0"):
        metrics.cumulative_match(short, 4)
    with pytest.raises(UserError, match="none of the 2 queries has a positive"):
        metrics.cumulative_match(Ranked(np.full((2, 1), -1), np.zeros(2, int)), 1)
