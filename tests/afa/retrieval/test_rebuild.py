"""Rebuilding an index after changes, after damage, and while other processes change it."""

import importlib.util
import json
from typing import Any

import numpy as np
import pytest
from gallery import MANIFEST, agree, expected, records, vectors

from afa.config import RetrievalConfig
from afa.errors import UserError
from afa.retrieval import export, index
from afa.retrieval.index import local, scann, tuning
from afa.retrieval.index.local import LocalIndex
from afa.retrieval.index.scann import Plan, ScannEngine
from afa.retrieval.indexing import indexed

needs_scann = pytest.mark.skipif(not scann.installed(), reason="ScaNN is not installed here")
URIS = ["exact://", pytest.param("scann://", marks=needs_scann)]


@pytest.fixture
def exported(tmp_path):
    export.write_export(tmp_path / "embeddings", records(), MANIFEST)
    return tmp_path / "embeddings"


def opened(directory, uri=None):
    found = index.load(directory, uri)
    assert isinstance(found, LocalIndex)
    return found


@needs_scann
def test_tuning_after_a_removal_returns_the_correct_images(exported):
    first = index.build(exported, "scann://")
    first.remove(records().ids[:40].tolist())
    first.update(records(5, seed=7, first=100))
    first.save()
    settings = RetrievalConfig(index="scann://", target_recall=0.9, tune_seconds=0.0)
    facts = indexed(exported, settings, lambda text: None)[1]
    assert facts["gallery_size"] == 260 and facts["recall_at_10"] >= 0.9
    old = records()
    kept = old.rows(np.r_[40:100, 105:300]).joined(records(5, seed=7, first=100))
    queries = vectors(20, seed=1)
    agree(index.load(exported).search(queries, 10), expected(queries, kept, 10))
    with pytest.raises(ValueError, match="has 300 rows, not 260"):
        index.create("scann://", kept, MANIFEST, ScannEngine.build(old.vectors, Plan()))


@needs_scann
@pytest.mark.parametrize(
    "plan", [Plan(), Plan("hashing", reorder=300), Plan("hashing", reorder=300, tuned=True)]
)
def test_an_opened_index_is_rebuilt_after_changes(exported, monkeypatch, plan):
    monkeypatch.setattr(local, "REBUILT_ROWS", 30)
    index.build(exported, "scann://", ScannEngine.build(records().vectors, plan))
    again = opened(exported)
    again.add(records(100, seed=3, first=300))
    info = again.info()
    assert (info["count"], info["added"]) == (400, 0)
    assert info["engine"]["kind"] == (plan.kind if plan.tuned else "brute_force")
    now, queries = records().joined(records(100, seed=3, first=300)), vectors(10, seed=1)
    agree(again.search(queries, 10), expected(queries, now, 10))


@pytest.mark.parametrize("uri", URIS)
def test_a_rebuild_by_another_process_is_detected(exported, uri):
    index.build(exported, uri)
    first = opened(exported)
    index.build(exported, "scann://?reorder=33" if uri == "scann://" else "exact://?recall=0.9")
    first.remove(["é/1"])
    with pytest.raises(UserError, match="was changed by another process since it was opened"):
        first.save()
    assert len(opened(exported)) == 300


def test_relative_and_absolute_paths_are_the_same_index(exported, monkeypatch):
    index.build(exported, "exact://")
    monkeypatch.chdir(exported.parent)
    first, other = opened(exported.name), opened(exported)
    other.remove(["é/1"])
    other.save()
    first.remove(["é/2"])
    with pytest.raises(UserError, match="was changed by another process"):
        first.save(exported)
    monkeypatch.chdir("/")
    other.remove(["é/3"])
    other.save()
    assert len(opened(exported)) == 298


def test_a_rebuild_that_fails_changes_nothing(monkeypatch):
    monkeypatch.setattr(local, "REBUILT_ROWS", 30)
    made, queries = index.create("exact://", records(), MANIFEST), vectors(5, seed=1)
    assert isinstance(made, LocalIndex)

    def full(rows):
        raise MemoryError

    made._build = full
    for change in (
        lambda: made.add(records(100, seed=3, first=300)),
        lambda: made.remove(records().ids[:100].tolist()),
    ):
        with pytest.raises(MemoryError):
            change()
        assert len(made) == 300
        agree(made.search(queries, 10), expected(queries, records(), 10))


@needs_scann
def test_rebuilding_repairs_a_damaged_folder(exported):
    built = index.build(exported, "scann://")
    folder = exported / built.manifest["engine"]["folder"]
    data = folder / "dataset.npy"
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match="is damaged"):
        index.load(exported)
    index.build(exported, "scann://")
    assert len(opened(exported)) == 300
    assert not list(exported.glob("damaged-*"))


@pytest.mark.parametrize("uri", URIS)
def test_another_gallery_replaces_the_old_one_atomically(exported, uri, monkeypatch):
    index.build(exported, uri)
    fresh = records(50, seed=9)

    def fails(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(LocalIndex, "written_engine", fails)
        with pytest.raises(UserError, match="its content is unchanged"):
            index.build(exported, uri, records=fresh, manifest=MANIFEST)
    assert len(opened(exported)) == 300
    index.build(exported, uri, records=fresh, manifest=MANIFEST)
    queries = vectors(5, seed=1)
    agree(opened(exported).search(queries, 5), expected(queries, fresh, 5))
    index.build(exported / "new", uri, records=fresh, manifest=MANIFEST)
    assert len(opened(exported / "new")) == 50


def test_missing_files_are_an_error(exported, monkeypatch):
    index.build(exported, "exact://")

    def missing(*_):
        raise FileNotFoundError("no such file")

    monkeypatch.setattr(export, "read_shards", missing)
    with pytest.raises(UserError, match=r"cannot be opened \(no such file\)"):
        index.load(exported)


@needs_scann
def test_a_range_search_is_complete_with_few_searched_leaves():
    rows = vectors(3000)
    engine = ScannEngine.build(rows, Plan("tree", 200, 1))
    found = engine.within(rows[:3], 0.0, None)
    for (near, _), line in zip(found, rows[:3] @ rows.T, strict=True):
        assert set(near) == set(np.flatnonzero(line >= 0))


@needs_scann
def test_tuning_for_many_results():
    found = tuning.tune(vectors(6000), 0.5, k=700, seconds=0.0)
    assert found.reached


@pytest.mark.skipif(
    importlib.util.find_spec("milvus_lite") is None, reason="milvus_lite is not installed"
)
def test_replaced_collections_are_removed_and_others_are_kept(exported, tmp_path, monkeypatch):
    uri = f"milvus://{tmp_path}/vectors.db?index=FLAT"

    def collections():
        return set(built._client.list_collections())

    built: Any = index.build(exported, uri)
    first = collections()
    built = index.build(exported, uri, records=records(40), manifest=MANIFEST)
    assert len(collections()) == 1 and collections() != first

    def fails(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_shards", fails)
        with pytest.raises(UserError, match="its content is unchanged"):
            index.build(exported, uri, records=records(50), manifest=MANIFEST)
    assert len(collections()) == 1
    other = index.load(exported)
    manifest = json.loads((exported / "index.json").read_text())
    (exported / "index.json").write_text(json.dumps(manifest | {"checkpoint": "another"}))
    with pytest.raises(UserError, match="was changed by another process"):
        other.remove(["é/1"])
    assert len(other) == 40
    (exported / "index.json").write_text(json.dumps(manifest))
    assert len(other.search(vectors(2), 40).ids[0]) == 40
    for each in (built, other):
        each.close()
