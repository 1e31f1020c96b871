"""The index interface: same results and same errors with every engine."""

import importlib.util
import json
import os
import pickle

import numpy as np
import pytest
from gallery import CLASSES, DIMENSION, MANIFEST, agree, expected, records, vectors

from afa.errors import UserError
from afa.manifest import staged
from afa.retrieval import export, index
from afa.retrieval.index import local
from afa.retrieval.records import Records

HAS = {name: importlib.util.find_spec(name) is not None for name in ("scann", "milvus_lite")}
LOCAL = [
    "exact://",
    "scann://",
    "scann://?leaves=12&searched=12&reorder=400",
    "scann://?leaves=12&searched=12&reorder=400&reduced=4&soar=1",
]
EMBEDDED = ["?index=HNSW&ef=512", "?index=FLAT", "?index=IVF_FLAT&nprobe=128"]
# Also tests a server if one is given: MILVUS_SERVER=localhost:19530
SERVER = os.environ.get("MILVUS_SERVER", "")
SERVED = ["?index=SCANN&nprobe=128", *EMBEDDED] if SERVER else []


def needs(library):
    return pytest.mark.skipif(not HAS[library], reason=f"{library} is not installed")


ENGINES = (
    [
        pytest.param(uri, marks=[needs("scann")] if uri.startswith("scann") else [], id=uri)
        for uri in LOCAL
    ]
    + [
        pytest.param(f"milvus://FILE{options}", marks=[needs("milvus_lite")], id=f"milvus{options}")
        for options in EMBEDDED
    ]
    + [pytest.param(f"milvus://{SERVER}{options}", id=f"server{options}") for options in SERVED]
)


@pytest.fixture(params=ENGINES)
def uri(request, tmp_path):
    return request.param.replace("FILE", str(tmp_path / "vectors.db"))


def drop_collection(collection):
    """Removes a collection of the server; its index may be closed."""
    client = importlib.import_module("pymilvus").MilvusClient(f"http://{SERVER}")
    client.drop_collection(collection)
    client.close()


@pytest.fixture
def make(uri):
    """Builds indexes of the engine and closes them afterwards."""
    made = []

    def call(rows=None, numbers=False):
        made.append(index.create(uri, rows or records(numbers=numbers), dict(MANIFEST)))
        return made[-1]

    yield call
    for each in made:
        each.close()
        if SERVER and SERVER in each.uri:
            drop_collection(each.collection)


@pytest.fixture(params=[False, True], ids=["text", "numbers"])
def numbers(request):
    return request.param


# ---- queries -----------------------------------------------------------------------------------


def test_results_equal_exact_search(make, numbers):
    rows, queries = records(numbers=numbers), vectors(100, seed=1)
    made = make(rows)
    for count in (1, 3, 100):  # one, few, and enough for all cores
        agree(made.search(queries[:count], 10), expected(queries[:count], rows, 10))
    for ids, scores in made.search(queries[:2], 4):
        assert len(ids) == len(scores) == 4
        assert all(type(each) is (int if numbers else str) for each in ids)


def test_one_valid_query_takes_the_fast_path():
    """The dtype of an array from another process is equal, but not identical."""
    made = index.create("exact://", records(), dict(MANIFEST))
    query = pickle.loads(pickle.dumps(vectors(1)))
    assert made._is_one_query(query)
    for other in (query.astype(">f4"), query.astype(np.float64), 2 * query, query[0], [query]):
        assert not made._is_one_query(other)


def test_k_may_be_the_number_of_rows(make):
    rows, queries = records(rows=50), vectors(2, seed=1)
    agree(make(rows).search(queries, 50), expected(queries, rows, 50))


def test_filters(make, numbers):
    rows, queries = records(numbers=numbers), vectors(5, seed=1)
    made = make(rows)
    classes = [CLASSES[1], CLASSES[3]]
    of_class = np.isin(rows.classes.astype(str), classes)
    agree(made.search(queries, 10, classes=classes), expected(queries, rows, 10, of_class))
    listed = np.zeros(300, bool)
    listed[[5, 7, 9, 200, 201, 202]] = True
    absent = [10**6] if numbers else ["nobody"]
    ids = [*rows.ids[listed].tolist(), *absent]
    agree(made.search(queries, 3, ids=ids), expected(queries, rows, 3, listed))
    both = of_class & listed
    results = made.search(queries, 10, classes=classes, ids=ids)
    assert results.found.sum(axis=1).tolist() == [both.sum()] * 5
    for (ids, scores), line in zip(results, queries, strict=True):
        expected_ids, expected_scores = expected(line[None], rows, int(both.sum()), both)
        assert ids == expected_ids[0].tolist()
        np.testing.assert_allclose(scores, expected_scores[0], atol=1e-5)
    assert not make(rows).search(queries, 3, ids=absent).found.any()
    assert not make(rows).search(queries, 3, ids=[]).found.any()


def test_range_search(make):
    rows, queries = records(), vectors(4, seed=1)
    made = make(rows)
    similar = queries @ rows.vectors.T
    jugs = np.array([name == "jug" for name in rows.classes])
    for classes, allowed in ((None, np.ones(300, bool)), (["jug"], jugs)):
        found = made.range_search(queries, 0.6, classes=classes)
        for (ids, scores), line in zip(found, similar, strict=True):
            near = np.flatnonzero((line >= 0.6) & allowed)
            assert ids == rows.ids[near[np.argsort(-line[near])]].tolist()
            assert np.all(np.diff(scores) <= 0)
    assert len(made.range_search(rows.vectors[:1], 1 - 1e-6)[0][0]) == 1
    assert made.range_search(-rows.vectors[:1], 0.9999) == [([], pytest.approx([]))]
    assert len(made.range_search(queries[:1], -1.0)[0][0]) == 300


def test_lookup_info_and_length(make, numbers, uri):
    rows = records(numbers=numbers)
    made = make(rows)
    ids = rows.ids[[7, 3]].tolist()
    assert made.lookup(ids) == [
        index.Entry(ids[0], CLASSES[3], "images/7.jpg"),
        index.Entry(ids[1], CLASSES[3], "images/3.jpg"),
    ]
    assert len(made) == 300
    info = made.info()
    assert (info["uri"], info["count"], info["dimension"]) == (uri, 300, DIMENSION)
    assert (info["ids"], info["checkpoint"]) == ("whole numbers" if numbers else "text", "step-5")
    assert json.loads(json.dumps(info)) == info


# ---- changes -----------------------------------------------------------------------------------


def test_changes_are_searched_at_once(make, numbers):
    rows, queries = records(numbers=numbers), vectors(20, seed=1)
    made = make(rows)
    more = records(30, seed=5, first=300, numbers=numbers)
    made.add(more)
    now = rows.joined(more)
    agree(made.search(queries, 10), expected(queries, now, 10))
    made.remove(now.ids[::9].tolist())
    now = now.rows(~np.isin(np.arange(330), np.arange(0, 330, 9)))
    assert len(made) == len(now)
    agree(made.search(queries, 10), expected(queries, now, 10))
    fresh = Records.of(vectors(12, seed=8), now.ids[100:112], ["lid"] * 12, ["new"] * 12)
    made.update(fresh)
    now = now.rows(~np.isin(np.arange(len(now)), np.arange(100, 112))).joined(fresh)
    results = made.search(queries, 10)
    ids, scores = expected(queries, now, 10)
    np.testing.assert_allclose(results.scores, scores, atol=1e-5)
    assert [set(line) for line in results.ids] == [set(line) for line in ids]
    assert made.lookup(fresh.ids[:1].tolist())[0].class_name == "lid"
    lids = np.arange(len(now)) >= len(now) - 12
    agree(made.search(queries, 5, classes=["lid"]), expected(queries, now, 5, lids))
    made.add(rows.rows(slice(1)))  # a removed id can be added again
    assert len(made) == len(now) + 1


def test_a_failed_change_changes_nothing(make, numbers):
    made, queries = make(numbers=numbers), vectors(4, seed=1)
    before = made.search(queries, 300)
    known = records(numbers=numbers).ids[4:6].tolist()
    absent = records(1, first=999, numbers=numbers).ids.tolist()
    errors = [
        (lambda: made.add(records(9, first=295, numbers=numbers)), "already contains"),
        (lambda: made.add(records(3, first=300, numbers=not numbers)), "ids must be .* as those"),
        (lambda: made.add(Records.of(vectors(2, dimension=4), [1, 2])), "embeddings have 4 dim"),
        (lambda: made.remove([*known, *absent]), "contains no image"),
        (lambda: made.remove(known * 2), "must be unique"),
        (lambda: made.remove(records(numbers=numbers).ids.tolist()), "cannot become empty"),
        (lambda: made.update(records(9, first=295, numbers=numbers)), "contains no image"),
        (lambda: made.lookup(absent), "contains no image"),
    ]
    for call, message in errors:
        with pytest.raises(UserError, match=message):
            call()
    agree(made.search(queries, 300), (before.ids, before.scores), 1e-6)


# ---- invalid input -----------------------------------------------------------------------------


def changed(value, row=1, column=0):
    queries = vectors(3)
    queries[row, column] = value
    return queries


QUESTIONS = {
    "NaN": (lambda i: i.search(changed(np.nan)), "queries: rows must be finite, but row 1"),
    "infinity": (lambda i: i.search(changed(np.inf)), "queries: rows must be finite, but row 1"),
    "NaN in one": (lambda i: i.search(changed(np.nan, 0)[:1]), "queries: rows must be finite"),
    "too long": (lambda i: i.search(vectors(3) * 2), "queries: rows must be unit vectors, but row"),
    "too long in one": (lambda i: i.search(vectors(1) * 2), "queries: rows must be unit vectors"),
    "zero": (lambda i: i.search(vectors(3) * 0), "queries: rows must be unit vectors, but row 0"),
    "dimension": (lambda i: i.search(vectors(3, dimension=4)), "have 4 dimensions, the index has"),
    "one vector": (lambda i: i.search(vectors(1)[0]), r"shape \(rows, dimensions\), not \(8,\)"),
    "integers": (lambda i: i.search(np.eye(8, dtype=int)), "must be real numbers, not int64"),
    "text": (lambda i: i.search([["a"] * 8]), "queries must be real numbers, not"),
    "ragged": (lambda i: i.search([[1.0], [1.0, 2.0]]), "queries must be a table"),
    "nothing": (lambda i: i.search(None), "queries must have the shape"),
    "k = 0": (lambda i: i.search(vectors(1), 0), "k=0 is not between 1 and 300"),
    "k < 0": (lambda i: i.search(vectors(1), -3), "k=-3 is not between 1 and 300"),
    "k too large": (lambda i: i.search(vectors(1), 301), "k=301 is not between 1 and 300"),
    "class": (lambda i: i.search(vectors(1), 1, classes=["cupp"]), "contains no class 'cupp'"),
    "no list": (lambda i: i.search(vectors(1), 1, classes="cup"), "must be a list of class names"),
    "one id": (lambda i: i.search(vectors(1), 1, ids="é/1"), "ids='é/1' must be a list"),
    "kind": (lambda i: i.search(vectors(1), 1, ids=[5]), "ids must be text, .* not whole numbers"),
    "mixed": (lambda i: i.search(vectors(1), 1, ids=[5, "a"]), "all whole numbers or all text"),
    "score": (lambda i: i.range_search(vectors(1), 1.5), "score=1.5 must lie between -1 and 1"),
    "NaN score": (lambda i: i.range_search(vectors(1), np.nan), "score=nan must lie between"),
    "range of NaN": (lambda i: i.range_search(changed(np.nan), 0.5), "rows must be finite"),
    "save nowhere": (lambda i: i.save(), "was never saved, so save needs a directory"),
    "another model": (lambda i: i.require(checkpoint="x"), "checkpoint 'step-5', not 'x'"),
}


def test_invalid_queries_are_errors(make):
    made = make()
    for name, (ask, message) in QUESTIONS.items():
        with pytest.raises(UserError, match=message):
            ask(made)
            pytest.fail(name)
    agree(made.search(vectors(3, seed=1), 5), expected(vectors(3, seed=1), records(), 5))


def test_no_queries_and_other_float_types(make):
    made, queries = make(), vectors(3, seed=1)
    assert made.search(queries[:0], 5).ids.shape == (0, 5)
    assert made.range_search(queries[:0], 0.5) == []
    results = expected(queries, records(), 5)
    agree(made.search(queries.astype(np.float64), 5), results)
    agree(made.search(queries[:, ::-1].copy()[:, ::-1], 5), results)
    agree(made.search(queries.tolist(), 5), results)


# ---- disk --------------------------------------------------------------------------------------


def opened_again(made, directory):
    made.close()
    return index.load(directory)


def test_a_saved_index_can_be_opened_and_changed(make, tmp_path, numbers):
    rows, queries, home = records(numbers=numbers), vectors(20, seed=1), tmp_path / "saved"
    made = make(rows)
    made.save(home)
    made.add(records(30, seed=5, first=300, numbers=numbers))
    made.remove(rows.ids[::9].tolist())
    made.save()
    results = made.search(queries, 12)
    again = opened_again(made, home)
    agree(again.search(queries, 12), (results.ids, results.scores), 1e-6)
    assert len(again) == 296
    again.add(records(5, seed=6, first=330, numbers=numbers))
    again.save()
    last = again.search(queries, 12)
    third = opened_again(again, home)
    agree(third.search(queries, 12), (last.ids, last.scores), 1e-6)
    third.require(checkpoint="step-5", preprocessing={"size": 64})
    third.close()


@pytest.mark.parametrize("uri", ENGINES[:3], indirect=True)
def test_a_moved_index_can_be_opened(make, tmp_path, uri):
    made, queries = make(), vectors(5, seed=1)
    made.save(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "saved").rename(tmp_path / "elsewhere" / "moved")
    agree(index.load(moved).search(queries, 5), expected(queries, records(), 5))
    assert str(tmp_path) not in (moved / "index.json").read_text()


@pytest.fixture
def exported(tmp_path):
    export.write_export(tmp_path / "embeddings", records(), MANIFEST)
    return tmp_path / "embeddings"


def test_an_index_of_an_export(exported, uri):
    queries = vectors(5, seed=1)
    built = index.build(exported, uri)
    agree(built.search(queries, 5), expected(queries, records(), 5))
    built.close()
    again = index.load(exported)
    agree(again.search(queries, 5), expected(queries, records(), 5))
    again.close()
    agree(index.load(exported, "exact://").search(queries, 5), expected(queries, records(), 5))
    read, manifest = export.read_export(exported)
    assert read.ids.tolist() == records().ids.tolist()
    assert manifest["engine"]["build_seconds"] >= 0
    replaced = index.build(exported, "exact://")
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        [".lock", "index.json", manifest["shards"][0]["file"]]
    )
    assert len(replaced) == 300


def test_an_export_without_an_index(exported):
    with pytest.raises(UserError, match="has embeddings but no index"):
        index.load(exported)
    with pytest.raises(UserError, match=r"has no index; build it with scann://"):
        index.load(exported, "scann://")
    index.build(exported, "exact://")
    with pytest.raises(UserError, match=r"was built with exact://; build it with scann://"):
        index.load(exported, "scann://")
    with pytest.raises(UserError, match="contains no finished index"):
        index.load(exported / "nothing")
    with pytest.raises(UserError, match="contains no finished export"):
        index.build(exported / "nothing")


@pytest.mark.parametrize("uri", ENGINES[:3], indirect=True)
def test_two_writers(make, tmp_path, uri):
    made = make()
    made.save(tmp_path / "saved")
    other = index.load(tmp_path / "saved")
    other.remove(["é/1"])
    other.save()
    made.remove(["é/2"])
    with pytest.raises(UserError, match="was changed by another process since it was opened"):
        made.save()
    assert len(index.load(tmp_path / "saved")) == 299
    error = pytest.raises(UserError, match="another process is writing there")
    with staged(tmp_path / "saved"), error:
        other.save()


def test_opening_while_another_process_writes(tmp_path, monkeypatch):
    """If a named file has been replaced, the new manifest is read."""
    made = index.create("exact://", records(), dict(MANIFEST))
    assert isinstance(made, local.LocalIndex)
    made.save(tmp_path)
    read, calls = export.read_shards, []

    def late(directory, manifest):
        calls.append(manifest["count"])
        if len(calls) == 1:
            made.remove(["é/1"])
            made.compact()
            made.save()
        return read(directory, manifest)

    monkeypatch.setattr(export, "read_shards", late)
    assert len(index.load(tmp_path)) == 299
    assert calls == [300, 299]


@pytest.mark.parametrize("uri", ENGINES[:3], indirect=True)
def test_many_changes_rebuild_the_engine(make, tmp_path, monkeypatch, uri):
    monkeypatch.setattr(local, "REBUILT_ROWS", 40)
    rows, queries = records(), vectors(10, seed=1)
    made = make(rows)
    made.save(tmp_path / "saved")
    made.add(records(50, seed=2, first=300))
    assert made.info()["added"] == 50
    made.add(records(50, seed=3, first=350))
    assert made.info()["added"] == 0
    now = rows.joined(records(50, seed=2, first=300)).joined(records(50, seed=3, first=350))
    made.remove(now.ids[:81].tolist())
    assert made.info()["removed"] == 0
    now = now.rows(slice(81, None))
    agree(made.search(queries, 10), expected(queries, now, 10))
    made.save()
    agree(index.load(tmp_path / "saved").search(queries, 10), expected(queries, now, 10))


@needs("milvus_lite")
def test_differences_of_collection_and_export_are_errors(exported, tmp_path):
    uri = f"milvus://{tmp_path}/vectors.db"
    built = index.build(exported, uri)
    built.remove(["é/1"])
    with pytest.raises(UserError, match=r"is in milvus.* and was changed there"):
        index.load(exported, "exact://")
    with pytest.raises(UserError, match="was changed there"):
        index.build(exported, "exact://")
    manifest = json.loads((exported / "index.json").read_text())
    manifest["engine"]["mark"] = "another"
    (exported / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"is not the one .* was built with"):
        index.load(exported)
    manifest["engine"]["collection"] = "other"
    (exported / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no collection 'other'"):
        index.load(exported)
    with pytest.raises(UserError, match=r"path='ppp.* is longer than 4096 bytes"):
        index.create(uri, Records.of(vectors(1), [1], None, ["p" * 5000]))
    built.close()


# ---- ids are data ------------------------------------------------------------------------------

HOSTILE = [
    "O'Brien.jpg", "a\\b.jpg", 'say "hi".jpg', "both '\".jpg", "x\\'y.jpg", "end\\", "\\\\x.jpg",
    "\\u0041.jpg", "tab\t.jpg", "new\nline.jpg", "return\r.jpg", "\x01\x0c.jpg", "é\u2028.jpg",
    "{ids}.jpg", "%s.jpg", '") or id != ("', "a,b].jpg",
]  # fmt: skip


def test_ids_and_classes_are_never_part_of_an_expression(make):
    """Searching, filtering and removing each affects no other."""
    left = [*HOSTILE, "plain"]
    vectors_of = dict(zip(left, vectors(len(left)), strict=True))
    made = make(Records.of(np.stack(list(vectors_of.values())), left, left))
    for each in HOSTILE:
        query = vectors_of[each][None]
        assert made.search(query, 1, classes=[each]).ids.tolist() == [[each]]
        assert made.lookup([each])[0].class_name == each
        made.remove([each])
        left.remove(each)
        assert (
            len(made) == len(left) and made.contains(left).all() and not made.contains([each]).any()
        )
