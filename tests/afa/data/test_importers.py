"""Lists and ground truth of public data sets, on small samples, and errors of malformed ones."""

import collections
import os
import pickle
import re

import numpy as np
import public_sets
import pytest

from afa.config import DataConfig
from afa.data.sources import gldv2, listed
from afa.data.sources.inshop import read_partition
from afa.data.sources.pickles import read_pickle
from afa.data.sources.registry import load
from afa.data.sources.revisited import read_ground_truth
from afa.data.types import fingerprint
from afa.errors import UserError


def names(dataset, split):
    return [dataset.class_names[c] for c in dataset.splits[split].classes]


def refused(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- pickles -------------------------------------------------------------------------------------


PLAIN = {
    "text": "Zürich", "raw": b"\x00\xff", "none": None, "true": True, "big": 2**70, "real": 0.1,
    "list": [1, (2, [3])], "map": {1: "a"},
}  # fmt: skip


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_and_arrays_round_trip(tmp_path, protocol):
    kinds = ("i8", ">i4", "u1", "f4", "?")
    arrays = [np.arange(6).reshape(2, 3).astype(dtype) for dtype in kinds]
    arrays += [np.asfortranarray(arrays[0]), np.zeros(0, np.int32), np.array(3.5)]
    scalars = [np.int64(-7), np.float32(0.5), np.bool_(True)]
    ordered = collections.OrderedDict(a=1, b=[2])
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([PLAIN, arrays, scalars, ordered], protocol))
    plain, found, numbers, mapping = read_pickle(path)
    assert plain == PLAIN
    for array, expected in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
    assert numbers == scalars and mapping == {"a": 1, "b": [2]}


def test_text_of_python_2_is_text(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02}q\x01U\x06imlistq\x02]q\x03U\x04caf\xe9q\x04as.")
    assert read_pickle(path) == {"imlist": ["café"]}


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


GLOBAL = b"cnumpy\ndtype\n"
HOSTILE = {
    "os.system": lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}")),
    "os.mkdir": lambda mark: pickle.dumps([1, {"a": Calls(os.mkdir, mark)}], 0),
    "builtins.eval": lambda mark: pickle.dumps(Calls(eval, f"open({mark!r}, 'w')"), 2),
    "builtins.getattr": lambda mark: pickle.dumps(Calls(getattr, np.zeros(1), "tofile")),
    "functools.partial": lambda mark: b"cfunctools\npartial\n.",
    "numpy.load": lambda mark: b"cnumpy\nload\n(S'" + mark.encode() + b"'\ntR.",
    "changes a function": lambda mark: GLOBAL + b"(N}S'__doc__'\nS'x'\nstb.",
    "outside the file": lambda mark: b"Psomething\n.",
    "array of 'O8'": lambda mark: pickle.dumps(np.array([None], object)),
    "array of 'V8'": lambda mark: pickle.dumps(np.zeros(2, "i4,i4")),
    "encodes text as 'hex'": lambda mark: b"c_codecs\nencode\n(Vab\nVhex\ntR.",
    "other objects than plain": lambda mark: GLOBAL + b".",
    "is damaged or not a pickle": lambda mark: pickle.dumps(PLAIN)[:-9],
    "not a pickle (": lambda mark: b"GIF89a",
    "not a pickle (EOFError": lambda mark: b"",
    "not a pickle (ValueError": lambda mark: pickle.dumps(np.arange(3, dtype=np.int64), 2).replace(
        b"K\x03\x85", b"K\x7f\x85"
    ),
}


@pytest.mark.parametrize("expected", HOSTILE)
def test_malicious_or_damaged_pickle_is_an_error_and_runs_no_code(tmp_path, expected):
    mark = tmp_path / "mark"
    path = tmp_path / "x.pkl"
    path.write_bytes(HOSTILE[expected](str(mark)))
    message = refused(read_pickle, path)
    message = message.replace("posix.", "os.").replace("__builtin__", "builtins")
    assert expected in message and message.startswith(f"{path}: ")
    assert list(tmp_path.iterdir()) == [path]


def test_missing_pickle_is_an_error(tmp_path):
    path = tmp_path / "x.pkl"
    assert refused(read_pickle, path) == f"{path}: cannot be read (No such file or directory)"


# ---- revisited Oxford and Paris ------------------------------------------------------------------


@pytest.mark.parametrize(("numpy", "inside"), [(False, ""), (True, "roxford5k")])
def test_ground_truth_of_revisited_oxford(tmp_path, numpy, inside):
    root = public_sets.revisited(tmp_path / inside, numpy=numpy)
    truth = read_ground_truth(tmp_path, "roxford5k")
    assert truth.gallery[1] == root / "jpg" / "all_souls_000001.jpg"
    assert truth.queries[2] == root / "jpg" / "query_2.jpg"
    assert truth.boxes == ((2.4, 3.0, 11.5, 18.0),) * 3
    indices = [[part.tolist() for part in kind] for kind in (truth.easy, truth.hard, truth.junk)]
    assert indices == [[[0, 1], [4], []], [[2], [5, 6], [7]], [[3], [], [0]]]


def test_missing_files_of_revisited_oxford_are_an_error(tmp_path):
    assert refused(read_ground_truth, tmp_path, "roxford5k") == (
        f"{tmp_path}/gnd_roxford5k.pkl is missing: the ground truth of roxford5k"
    )
    public_sets.revisited(tmp_path, "rparis6k")
    (tmp_path / "jpg" / "query_1.jpg").unlink()
    (tmp_path / "jpg" / "all_souls_000004.jpg").write_bytes(b"")
    assert refused(read_ground_truth, tmp_path, "rparis6k") == (
        f"2 of the 11 images of {tmp_path}/gnd_rparis6k.pkl are missing or empty: "
        f"{tmp_path}/jpg/all_souls_000004.jpg, {tmp_path}/jpg/query_1.jpg"
    )
    (tmp_path / "jpg").rename(tmp_path / "images")
    message = refused(read_ground_truth, tmp_path, "rparis6k")
    assert message == f"{tmp_path}/jpg is missing: the folder of the images of rparis6k"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.pop("gnd"), "is not a ground truth (expected lists imlist, qimlist and gnd)"),
        (lambda c: c["gnd"].pop(), "holds 8 images, 3 queries and ground truth of 2"),
        (lambda c: c["gnd"][1].pop("junk"), "query 1 has no 'junk' (expected easy, hard and junk)"),
        (lambda c: c["gnd"][1].update(hard=[8]), "query 1: 'hard' are not indices of 8 images"),
        (lambda c: c["gnd"][1].update(hard=["a"]), "query 1: 'hard' are not indices of 8"),
        (
            lambda c: c["gnd"][0].update(bbx=[1, 2, 3]),
            "query 0: 'bbx' is [1, 2, 3], not a box of 4",
        ),
        (
            lambda c: c["gnd"][0].update(bbx=[5, 2, 3, 4]),
            "query 0: 'bbx' is [5, 2, 3, 4], not a box",
        ),
    ],
)
def test_malformed_ground_truth_is_an_error(tmp_path, change, expected):
    public_sets.revisited(tmp_path)
    path = tmp_path / "gnd_roxford5k.pkl"
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))
    message = refused(read_ground_truth, tmp_path, "roxford5k")
    assert expected in message and message.startswith(f"{path}: ")


# ---- In-Shop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "where"), [("Img", "Eval"), ("", "")])
def test_inshop_splits(tmp_path, top, where):
    public_sets.inshop(tmp_path, top=top, where=where)
    data = load(DataConfig(name="inshop", path=str(tmp_path)))
    assert names(data, "test") == [f"id_{i:08d}" for i in (5, 6, 7)]
    assert sorted(names(data, "train") + names(data, "validation")) == [
        f"id_{i:08d}" for i in range(5)
    ]
    assert data.train.gallery is None
    expected = [not name.endswith("00_1_front.jpg") for name in data.test.ids]
    assert data.test.gallery is not None and data.test.gallery.tolist() == expected
    assert data.test.images[0] == (tmp_path / top / data.test.ids[0]).read_bytes()
    assert data.protocol.startswith("class-disjoint: 5 items of In-Shop's train train (2 of them")
    path = tmp_path / where / "list_eval_partition.txt"
    content = path.read_text()
    path.write_text(content.replace("id_00000006 query", "id_00000006 gallery"))
    other = load(DataConfig(name="inshop", path=str(tmp_path)))
    assert other.test.ids == data.test.ids and other.test_fingerprint != data.test_fingerprint
    path.write_text(content)
    fold = load(DataConfig(name="inshop", path=str(tmp_path), folds=2, fold=1))
    assert len(names(fold, "validation")) == 2
    assert fold.test_fingerprint == data.test_fingerprint


def test_unreadable_images_of_a_list_are_skipped(tmp_path):
    public_sets.inshop(tmp_path)
    corrupted = "img/WOMEN/Tees/id_00000006/00_1_front.jpg"
    (tmp_path / "Img" / corrupted).write_bytes(b"\xff\xd8broken")
    data = load(DataConfig(name="inshop", path=str(tmp_path), max_unreadable=0.1))
    assert len(data.skipped) == 1 and data.skipped[0].startswith(corrupted)
    assert data.test.gallery is not None
    for i, name in enumerate(data.test.ids):
        assert data.class_names[data.test.labels[i]] in name
        assert data.test.images[i] == (tmp_path / "Img" / name).read_bytes()
        assert data.test.gallery[i] == ("00_1" not in name)
    rows = [
        (
            name,
            int(data.test.labels[i]),
            "test/gallery" if data.test.gallery[i] else "test",
            (tmp_path / "Img" / name).stat().st_size,
        )
        for i, name in enumerate(data.test.ids)
    ]
    assert data.test_fingerprint == fingerprint(rows)
    with pytest.raises(UserError, match="1 of 24 images"):
        load(DataConfig(name="inshop", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t: t.replace("image_name", "image"),
            "line 2 is 'image item_id evaluation_status',",
        ),
        (
            lambda t: t.replace(" train", " tain", 1),
            "expected a path, an item, and train, query or",
        ),
        (lambda t: t.replace("24\n", "25\n"), "holds 24 images, and its first line says '25'"),
        (lambda t: "24\n", "has 1 lines, and the images start at line 3"),
    ],
)
def test_malformed_partition_is_an_error(tmp_path, change, expected):
    path = public_sets.inshop(tmp_path) / "Eval" / "list_eval_partition.txt"
    path.write_text(change(path.read_text()))
    message = refused(read_partition, tmp_path)
    assert expected in message and message.startswith(f"{path}: ")


def test_missing_files_of_inshop_are_an_error(tmp_path):
    assert refused(load, DataConfig(name="inshop")) == (
        "data.path is empty, and a directory is needed"
    )
    config = DataConfig(name="inshop", path=str(tmp_path))
    assert refused(load, config) == (
        f"{tmp_path}/list_eval_partition.txt is missing: the partition of DeepFashion In-Shop"
    )
    public_sets.inshop(tmp_path)
    lost = tmp_path / "Img/img/WOMEN/Tees/id_00000003/01_1_front.jpg"
    lost.unlink()
    assert refused(load, config) == (
        f"1 of the 24 images of {tmp_path}/Eval/list_eval_partition.txt are missing or empty: "
        f"{lost}"
    )
    path = tmp_path / "Eval" / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("id_00000003 train", "id_00000003 query", 1))
    assert refused(load, config) == (
        "list_eval_partition.txt: item 'id_00000003' is in train and in test"
    )
    config = DataConfig(name="inshop", path=str(tmp_path / "nowhere"))
    assert refused(load, config) == f"data.path={str(tmp_path / 'nowhere')!r} does not exist"


# ---- Google Landmarks v2 -------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [True, False])
def test_every_tenth_landmark_is_for_testing(tmp_path, clean):
    public_sets.gldv2(tmp_path, clean=clean)
    data = load(DataConfig(name="gldv2", path=str(tmp_path)))
    landmarks = [str(100 + 7 * i) for i in range(30)]
    assert names(data, "test") == landmarks[9::10]
    assert len(names(data, "validation")) == 5
    both = {*names(data, "train"), *names(data, "validation")}
    assert both == set(landmarks) - set(landmarks[9::10])
    assert (
        data.test.images[0]
        == (tmp_path / "train" / "2" / "1" / "0" / f"{data.test.ids[0]}.jpg").read_bytes()
    )
    assert "99" in data.class_names and data.test.gallery is None
    listed_in = "train_clean.csv" if clean else "train.csv"
    assert f"of 30 landmarks of {listed_in} with 2 images or more every tenth" in data.protocol


def test_images_of_a_long_list_are_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(listed, "DECODED", 10)
    public_sets.gldv2(tmp_path)
    for path in sorted((tmp_path / "train").rglob("*.jpg"))[:20]:
        path.write_bytes(b"no image")
    assert load(DataConfig(name="gldv2", path=str(tmp_path))).skipped == ()


def test_ignored_queries_are_skipped(tmp_path):
    public_sets.gldv2(tmp_path)
    _, retrieval = gldv2.read_retrieval(tmp_path)
    test, index = ([public_sets.landmark_id(n + i) for i in range(6)] for n in (700, 500))
    assert retrieval.queries == (test[0], test[1], test[3])
    assert retrieval.answers == ((index[0], index[1]), (index[2],), (index[4], index[5]))
    assert retrieval.usage == ("Public", "Private", "Private")
    _, recognition = gldv2.read_recognition(tmp_path)
    assert recognition.answers == (("100",), ("107", "114"), (), ("121",))
    assert gldv2.read_index(tmp_path)[1] == tuple(index)


@pytest.mark.parametrize(
    ("read", "file", "content", "expected"),
    [
        (gldv2.read_train, "train_clean.csv", None, "is missing: the training images of Landm"),
        (gldv2.read_train, "train_clean.csv", "landmark_id,images\nx,ab\n", "is not an integer"),
        (gldv2.read_train, "train_clean.csv", "landmark_id,images\n", "lists no images"),
        (gldv2.read_train, "train_clean.csv", "id,images\n",
         "has no column 'landmark_id' (its first line is 'id,images', expected landmark_id,im"),
        (gldv2.read_index, "index.csv", None, "is missing: the index images"),
        (gldv2.read_index, "index.csv", "", "has no column 'id' (its first line is ''"),
        (gldv2.read_retrieval, "retrieval_solution_v2.1.csv", None, "is missing: the retrieval"),
        (gldv2.read_retrieval, "retrieval_solution_v2.1.csv", "id,images,Usage\na,b\n",
         "line 2 has too few columns"),
        (gldv2.read_recognition, "recognition_solution_v2.1.csv", "id,landmarks,Usage\n",
         "lists no images"),
        (gldv2.read_recognition, "recognition_solution_v2.1.csv", b"\xff\xfe\x00",
         "cannot be read"),
    ],
)  # fmt: skip
def test_malformed_lists_are_an_error(tmp_path, read, file, content, expected):
    public_sets.gldv2(tmp_path)
    path = tmp_path / file
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(read, tmp_path)
    assert re.match(re.escape(str(path)), message) and expected in message


def test_missing_images_of_landmarks_are_an_error(tmp_path):
    public_sets.gldv2(tmp_path)
    for path in sorted((tmp_path / "train").rglob("*.jpg"))[:9]:
        path.unlink()
    message = refused(load, DataConfig(name="gldv2", path=str(tmp_path)))
    assert re.fullmatch(
        rf"[89] of the 60 images of {tmp_path}/train_clean.csv are missing or empty: "
        r"\S+.jpg, \S+.jpg, \S+.jpg, and [56] more",
        message,
    )
