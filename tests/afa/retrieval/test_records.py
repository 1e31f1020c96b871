"""Invalid rows, ids and addresses are errors before an engine is called."""

import importlib.util

import numpy as np
import pytest
from gallery import MANIFEST, records, vectors

from afa.errors import UserError
from afa.retrieval import index
from afa.retrieval.records import Records

HAS = {name: importlib.util.find_spec(name) is not None for name in ("scann", "milvus_lite")}


def needs(library):
    return pytest.mark.skipif(not HAS[library], reason=f"{library} is not installed")


def changed(value):
    """Three unit vectors, the second with one value replaced."""
    found = vectors(3)
    found[1, 0] = value
    return found


ROWS = {
    "none": (lambda: Records.of(vectors(0), []), "there are no embeddings"),
    "no list": (lambda: Records.of(vectors(3), "abc"), "must be a list"),
    "NaN row": (lambda: Records.of(changed(np.nan), [1, 2, 3]), "rows must be finite, but row 1"),
    "infinite": (lambda: Records.of(changed(-np.inf), [1, 2, 3]), "rows must be finite"),
    "length": (lambda: Records.of(vectors(3) * 3, [1, 2, 3]), "must be unit vectors, but row 0"),
    "columns": (lambda: Records.of(vectors(3), [1, 2]), "ids has 2 entries for 3 embeddings"),
    "twice": (lambda: Records.of(vectors(3), ["a", "b", "a"]), "but 'a' appears twice"),
    "mixed": (lambda: Records.of(vectors(3), [1, "b", 2]), "or all text, but one is 'b'"),
    "half": (lambda: Records.of(vectors(2), [1, 2.5]), "or all text, but one is 2.5"),
    "halves": (lambda: Records.of(vectors(2), np.array([0.0, 1.0])), "or all text, but one is 0.0"),
    "none of it": (lambda: Records.of(vectors(2), ["a", None]), "but one is None"),
    "truth": (lambda: Records.of(vectors(2), [True, False]), "or all text, but one is True"),
    "empty": (lambda: Records.of(vectors(2), ["a", ""]), "must not be empty, but one is ''"),
    "large": (lambda: Records.of(vectors(2), [1, 2**63]), "must fit into 64 bits"),
    "a table": (lambda: Records.of(vectors(2), np.ones((2, 2), int)), "ids must be a list, not of"),
    "classes": (lambda: Records.of(vectors(2), [1, 2], ["a"]), "classes has 1 entries for 2"),
    "class 7": (lambda: Records.of(vectors(2), [1, 2], ["a", 7]), "must be text, but one is 7"),
    "paths": (lambda: Records.of(vectors(2), [1, 2], None, "ab"), "paths='ab' must be a list"),
    "flat": (lambda: Records.of(vectors(2)[0], [1]), "embeddings must have the shape"),
    "no dimension": (lambda: Records.of(vectors(2)[:, :0], [1, 2]), "have no dimensions"),
    "integers": (
        lambda: Records.of(np.eye(2, dtype=int), [1, 2]),
        "must be real numbers, not int64",
    ),
    "complex": (lambda: Records.of(np.eye(2) * 1j, [1, 2]), "must be real numbers, not complex"),
}


@pytest.mark.parametrize("name", ROWS)
def test_invalid_rows_are_errors(name):
    make_rows, message = ROWS[name]
    with pytest.raises(UserError, match=message):
        make_rows()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "scann",
            r"retrieval\.index='scann' is not an address; did you mean 'scann'\? \(exact://, ",
        ),
        ("scan://", r"retrieval\.index='scan' is unknown; did you mean 'scann'\?"),
        ("exact://host", "exact:// takes no location"),
        ("exact://?recal=0.9", r"recal is not an option of exact://; did you mean 'recall'\?"),
        ("exact://?recall=2", "recall=2.0 must lie in"),
        ("exact://?recall=a", "recall='a' is not a number"),
        ("exact://?recall=1&recall=1", "recall is given twice"),
        ("exact://#x", "# is not allowed"),
        pytest.param("scann://dir", "scann:// takes no location", marks=needs("scann")),
        pytest.param("scann://?leaves=0", "leaves=0 is too small", marks=needs("scann")),
        pytest.param(
            "scann://?leaves=5&searched=6", "searched must not exceed leaves", marks=needs("scann")
        ),
        pytest.param("scann://?reorder=1.5", "'1.5' is not a whole number", marks=needs("scann")),
        pytest.param("scann://?spherical=yes", "spherical='yes' is unk", marks=needs("scann")),
        ("milvus://", "milvus:// needs HOST:PORT or PATH/file.db"),
        ("milvus://a.db?index=SCANN", "the embedded file has no SCANN index"),
        ("milvus://host:1?index=HNWS", "did you mean 'HNSW'"),
        ("milvus://host:1?ef=many", "ef='many' is not a whole number"),
        pytest.param("milvus://localhost:1", "milvus://localhost:1: ", marks=needs("milvus_lite")),
    ],
)
def test_invalid_addresses_are_errors(uri, message):
    with pytest.raises(UserError, match=message):
        index.create(uri, records(), MANIFEST)


def test_missing_libraries(monkeypatch):
    def missing(name, *_):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "installed, but cannot be imported")
    with pytest.raises(
        UserError, match=r"scann:// cannot be used \(.*: TensorFlow 2\.21 and later"
    ):
        index.check("scann://")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"scann:// cannot be used \(No module .*: install scann"):
        index.check("scann://")
    with pytest.raises(UserError, match=r"milvus:// cannot be used .*pip install 'afa\[milvus\]'"):
        index.check("milvus://a.db")
    assert index.default_uri() == "exact://"
