"""Missing or invalid fields of the manifest of an index are errors of one line."""

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


def corrupt(manifest, path, value):
    """Sets a field, or removes it if `value` is None."""
    *parents, last = path
    for each in parents:
        manifest = manifest[each]
    if value is None:
        del manifest[last]
    else:
        manifest[last] = value


@pytest.mark.parametrize("uri", URIS)
def test_any_invalid_field_is_a_user_error(built, uri):
    directory = built(uri)
    path = directory / "index.json"
    original = json.loads(path.read_text())
    fields = [(name,) for name in original]
    fields += [("shards", 0, name) for name in original["shards"][0]]
    fields += [("engine", name) for name in original["engine"]]
    for field in fields:
        for value in (None, [], 3.5, "?"):
            changed = json.loads(json.dumps(original))
            corrupt(changed, field, value)
            path.write_text(json.dumps(changed))
            try:
                index.load(directory).search(vectors(1), 3)
            except UserError as error:
                assert "\n" not in str(error)
    path.write_text(json.dumps(original))
    assert len(index.load(directory)) == 40


@pytest.mark.parametrize(
    ("field", "value", "message"),
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
def test_errors_name_the_field(built, field, value, message):
    directory = built()
    path = directory / "index.json"
    manifest = json.loads(path.read_text())
    corrupt(manifest, field, value)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        index.load(directory)
    assert str(error.value).startswith(f"{path} is damaged") and message in str(error.value)


def test_fewer_images_than_the_default_number_of_results(built):
    """Three images: three results by default, but k=10 is an error."""
    results = index.load(built(rows=3)).search(vectors(2))
    assert results.scores.shape == (2, 3) and results.found.all()
    with pytest.raises(UserError, match="k=10 is not between 1 and 3"):
        index.load(built(rows=3)).search(vectors(2), 10)
    assert index.load(built(rows=40)).search(vectors(2)).scores.shape == (2, 10)
