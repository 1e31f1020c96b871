"""What is written down beside an index is not trusted: a field that is lost is told in one line."""

import json

import pytest
from gallery import MANIFEST, records, vectors

from afa.errors import UserError
from afa.retrieval import index
from afa.retrieval.index import scann

URIS = ["exact://", pytest.param("scann://", marks=pytest.mark.skipif(
    not scann.installed(), reason="ScaNN is not installed here"))]  # fmt: skip


@pytest.fixture
def built(tmp_path):
    def make(uri="exact://", rows=40):
        index.build(tmp_path / "index", uri, records=records(rows), manifest=MANIFEST)
        return tmp_path / "index"

    return make


def corrupted(manifest, path, value):
    *parents, last = path
    for each in parents:
        manifest = manifest[each]
    if value is None:
        del manifest[last]
    else:
        manifest[last] = value


@pytest.mark.parametrize("uri", URIS)
def test_no_field_of_a_manifest_can_be_lost_with_a_traceback(built, uri):
    directory = built(uri)
    path = directory / "index.json"
    whole = json.loads(path.read_text())
    places = [(name,) for name in whole]
    places += [("shards", 0, name) for name in whole["shards"][0]]
    places += [("engine", name) for name in whole["engine"]]
    for place in places:
        for value in (None, [], 3.5, "?"):
            changed = json.loads(json.dumps(whole))
            corrupted(changed, place, value)
            path.write_text(json.dumps(changed))
            try:
                index.load(directory).search(vectors(1), 3)
            except UserError as error:
                assert "\n" not in str(error)
    path.write_text(json.dumps(whole))
    assert len(index.load(directory)) == 40


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("shards",), None, "it lacks shards"),
        (("dimension",), None, "it lacks dimension"),
        (("shards",), {}, "shards is {}"),
        (("shards", 0), "x", "shards[0] is 'x'"),
        (("shards", 0, "rows"), None, "it lacks shards[0].rows"),
        (("engine", "uri"), None, "it lacks engine.uri"),
        (("engine", "rows"), None, "KeyError: 'rows'"),
        (("count",), "many", "count is 'many'"),
    ],
)
def test_what_is_lost_is_named(built, place, value, told):
    directory = built()
    path = directory / "index.json"
    manifest = json.loads(path.read_text())
    corrupted(manifest, place, value)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        index.load(directory)
    assert str(error.value).startswith(f"{path} is damaged") and told in str(error.value)


def test_fewer_images_than_the_usual_number_of_results(built):
    """Three images: three results; a number that was asked for is still refused."""
    found = index.load(built(rows=3)).search(vectors(2))
    assert found.scores.shape == (2, 3) and found.found.all()
    with pytest.raises(UserError, match="k=10 is not between 1 and 3"):
        index.load(built(rows=3)).search(vectors(2), 10)
    assert index.load(built(rows=40)).search(vectors(2)).scores.shape == (2, 10)
