"""Public benchmarks: metrics on small data sets with known answers, and the command."""

import json
import pickle
import re
import shutil

import numpy as np
import public_sets
import pytest
from PIL import Image

from afa.data.images import decode
from afa.data.types import Files
from afa.errors import UserError
from afa.evaluation import benchmarks
from afa.evaluation.benchmarks.revisited import Cropped
from afa.evaluation.metrics.retrieval import Ranked, precision_to_last
from experiments import evaluate as command


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def on_a_line(similarities):
    """Unit vectors whose product with the first axis is as given."""
    cosine = np.asarray(similarities, np.float32)
    return np.stack([cosine, np.sqrt(1 - cosine**2)], axis=1)


def values(benchmark, queries, gallery):
    figures = benchmark.score(queries, gallery)
    return {(each.part, each.name): each.value for each in figures}, figures


# ---- revisited Oxford and Paris ------------------------------------------------------------------


def test_difficulties_of_one_ranking(tmp_path):
    """The gallery in the order J E E H . . H H of rows 3 0 1 2 4 5 6 7; each query by hand.

    query 0: easy 0 1, hard 2, junk 3; query 1: easy 4, hard 5 6; query 2: hard 7, junk 0.
    """
    benchmark = benchmarks.load("roxford5k", public_sets.revisited(tmp_path))
    order = [3, 0, 1, 2, 4, 5, 6, 7]
    similarity = np.zeros(8)
    similarity[order] = np.linspace(0.9, 0.2, 8)
    found, figures = values(benchmark, on_a_line([1, 1, 1]), on_a_line(similarity))
    # Query 0: its easy images come first. Query 1: all three positives follow four negatives.
    # Query 2: its positive follows six negatives.
    assert found["easy", "mAP"] == pytest.approx((1.0 + in_a_row(1, 4)) / 2)
    assert found["medium", "mAP"] == pytest.approx((1.0 + in_a_row(3, 4) + in_a_row(1, 6)) / 3)
    assert found["hard", "mAP"] == pytest.approx(
        (in_a_row(1, 0) + in_a_row(2, 4) + in_a_row(1, 6)) / 3
    )
    easy = next(each for each in figures if (each.part, each.name) == ("easy", "mAP"))
    assert easy.queries == 2 and easy.interval is not None
    assert easy.interval.low <= easy.value <= easy.interval.high
    ranked = Ranked.from_lists([np.array(order)] * 3, [[0, 1, 2], [4, 5, 6], [7]], [[3], [], [0]])
    for k in (1, 5, 10):
        expected = np.nanmean(precision_to_last(ranked, k))
        assert found["medium", f"mP@{k}"] == pytest.approx(expected)
    assert {part for part, _ in found} == {"easy", "medium", "hard"}


def in_a_row(count, wrong):
    """Trapezoidal AP of `count` consecutive positives that follow `wrong` negatives."""
    if not wrong:
        return 1.0
    pairs = [(i / (wrong + i), (i + 1) / (wrong + i + 1)) for i in range(count)]
    return sum((before + after) / 2 for before, after in pairs) / count


def test_distractors_are_searched_and_lower_the_metrics(tmp_path):
    root = public_sets.revisited(tmp_path / "data")
    extra = [public_sets.image(tmp_path / "more" / f"{i}.jpg", 9) for i in range(3)]
    plain = benchmarks.load("roxford5k", root)
    full = benchmarks.load("roxford5k", root, extra)
    assert len(full.gallery) == len(plain.gallery) + 3 == 11
    assert full.gallery.images[10] == extra[2].read_bytes()
    assert "3 distractors" in full.protocol and "distractors" not in plain.protocol
    similarity = np.linspace(0.8, 0.1, 8)
    queries = on_a_line([1, 1, 1])
    before, _ = values(plain, queries, on_a_line(similarity))
    after, _ = values(full, queries, on_a_line([*similarity, 0.95, 0.94, 0.0]))
    assert all(after[key] < before[key] for key in before if key[1] == "mAP")
    same, _ = values(full, queries, on_a_line([*similarity, 0.03, 0.02, 0.01]))
    assert same == before


def test_a_level_without_any_positive_is_left_out(tmp_path):
    public_sets.revisited(tmp_path)
    path = tmp_path / "gnd_roxford5k.pkl"
    content = pickle.loads(path.read_bytes())
    for query in content["gnd"]:
        query["easy"] = []
    path.write_bytes(pickle.dumps(content))
    benchmark = benchmarks.load("roxford5k", tmp_path)
    found, _ = values(benchmark, on_a_line([1, 1, 1]), on_a_line(np.linspace(0, 0.9, 8)))
    assert {part for part, _ in found} == {"medium", "hard"}


def test_queries_are_cropped_to_their_boxes_within_the_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    boxes = [(2.4, 3.0, 11.5, 9.6), None, (-4.0, -1.0, 99.0, 99.0), (19.9, 11.8, 25.0, 30.0)]
    boxes.append((3.2, 4.1, 3.4, 4.2))
    cut = Cropped(Files([str(path)] * 5), boxes)
    np.testing.assert_array_equal(decode(cut[4]), pixels[4:5, 3:4])
    np.testing.assert_array_equal(decode(cut[0]), pixels[3:10, 2:12])
    assert cut[1] == path.read_bytes()
    np.testing.assert_array_equal(decode(cut[2]), pixels)
    assert decode(cut[3]).shape == (1, 1, 3)
    assert [decode(each).shape for each in cut[1:3]] == [pixels.shape] * 2


# ---- Google Landmarks ----------------------------------------------------------------------------


def test_landmark_retrieval_by_part_of_the_test_set(tmp_path):
    """Answers by similarity 0 1 2 3 4 5: query 0 has 0 1, query 1 has 2, query 3 has 4 5."""
    benchmark = benchmarks.load("gldv2", public_sets.gldv2(tmp_path))
    assert (len(benchmark.queries), len(benchmark.gallery)) == (3, 6)
    found, figures = values(benchmark, on_a_line([1] * 3), on_a_line(np.linspace(0.9, 0.4, 6)))
    private = (1 / 3 + (1 / 5 + 2 / 6) / 2) / 2
    assert found == {
        ("Public", "mAP@100"): pytest.approx(1.0), ("Private", "mAP@100"): pytest.approx(private)
    }  # fmt: skip
    assert [(each.queries, each.interval is None) for each in figures] == [(2, False), (1, True)]


def test_landmark_recognition_by_the_nearest_training_image(tmp_path):
    """Of the private images one is right, one has no landmark and is surer, one is wrong."""
    benchmark = benchmarks.load("gldv2_recognition", public_sets.gldv2(tmp_path))
    assert len(benchmark.gallery) == 61 and len(benchmark.queries) == 4
    classes = benchmark.gallery.labels
    gallery = np.zeros((61, 6), np.float32)
    gallery[:, 5] = 1
    for axis, landmark in enumerate((100, 114, 121)):
        gallery[np.flatnonzero(classes == landmark)[0]] = np.eye(6)[axis]
    queries = unit([[1, 0, 0, 0.1, 0, 0], [0, 1, 0, 0.5, 0, 0], [0, 0, 1, 0.2, 0, 0],
                    [0, 1, 0, 0.9, 0, 0]])  # fmt: skip
    found, _ = values(benchmark, queries, gallery)
    assert found == {("Public", "GAP"): 1.0, ("Private", "GAP"): pytest.approx(1 / 2 / 2)}
    with pytest.raises(UserError, match="--distractors: gldv2_recognition takes none"):
        benchmarks.load("gldv2_recognition", tmp_path, [tmp_path / "x.jpg"])


# ---- classes -------------------------------------------------------------------------------------


def test_inshop_queries_among_its_gallery(tmp_path):
    benchmark = benchmarks.load("inshop", public_sets.inshop(tmp_path))
    assert benchmark.protocol == "3 queries of 3 classes among 6 images"
    oracle, figures = values(
        benchmark, np.eye(9, dtype=np.float32)[benchmark.queries.labels],
        np.eye(9, dtype=np.float32)[benchmark.gallery.labels],
    )  # fmt: skip
    assert set(oracle.values()) == {1.0}
    assert [name for _, name in oracle][:3] == ["Recall@1", "Recall@10", "Recall@20"]
    assert all(each.interval is not None and each.queries == 3 for each in figures)


def test_folders_with_distractors(tmp_path):
    for part, count in (("query", 1), ("gallery", 2)):
        for i, name in enumerate("abc"):
            for number in range(count):
                public_sets.image(tmp_path / part / name / f"{number}.jpg", 60 * i, number)
    extra = [public_sets.image(tmp_path / "more" / "0.jpg", 9)]
    benchmark = benchmarks.load("folder", tmp_path, extra)
    assert benchmark.queries.ids == ("query/a/0.jpg", "query/b/0.jpg", "query/c/0.jpg")
    assert benchmark.gallery.labels.tolist() == [0, 0, 1, 1, 2, 2, -1]
    assert benchmark.gallery.images[3] == (tmp_path / "gallery/b/1.jpg").read_bytes()
    eye = np.eye(3, dtype=np.float32)
    gallery = np.concatenate([eye[[0, 0, 1, 1, 2, 2]], eye[[0]]])
    found, _ = values(benchmark, eye, gallery)
    assert found["", "Recall@1"] == 1 and found["", "MAP@R"] == 1  # the tie goes to the first
    gallery[:2] = unit([[1, 0.1, 0]])  # now the distractor is more alike
    found, _ = values(benchmark, eye, gallery)
    assert found["", "Recall@1"] == pytest.approx(2 / 3)
    assert found["", "MAP@R"] == pytest.approx((1 / 4 + 1 + 1) / 3)
    (tmp_path / "query").rename(tmp_path / "asked")
    with pytest.raises(UserError) as error:
        benchmarks.load("folder", tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/query is missing: a folder of class folders with images"
    )
    (tmp_path / "query").write_text("a file")
    with pytest.raises(UserError, match=r"--path='.*/query' is not a directory"):
        benchmarks.load("folder", tmp_path)
    (tmp_path / "query").unlink()
    (tmp_path / "query").mkdir()
    with pytest.raises(UserError, match="folder has no queries"):
        benchmarks.load("folder", tmp_path)


def test_distractors_that_are_images_of_the_benchmark_are_refused(tmp_path):
    for part in ("query", "gallery"):
        for i, name in enumerate("ab"):
            public_sets.image(tmp_path / part / name / "0.jpg", 60 * i, len(part))
    gallery = [tmp_path / "gallery" / name / "0.jpg" for name in "ab"]
    copied = tmp_path / "more" / "copy.jpg"
    copied.parent.mkdir()
    shutil.copy(tmp_path / "query" / "a" / "0.jpg", copied)
    linked = copied.with_name("linked.jpg")
    linked.symlink_to(gallery[1])
    other = public_sets.image(copied.with_name("other.jpg"), 200)
    assert len(benchmarks.load("folder", tmp_path, [other]).gallery) == 3
    for wrong in (gallery[0], copied, linked):
        with pytest.raises(UserError) as error:
            benchmarks.load("folder", tmp_path, [other, wrong])
        told = f"--distractors: 1 of 2 are images of the benchmark, and would .*: {wrong} is "
        assert re.match(told, str(error.value))
    root = public_sets.revisited(tmp_path / "oxford")
    asked = [path for path in sorted((root / "jpg").iterdir()) if path.name.startswith("query")]
    with pytest.raises(UserError, match="--distractors: 3 of 3 are images of the benchmark"):
        benchmarks.load("roxford5k", root, asked)


def test_folders_of_a_benchmark_follow_the_rule_of_all_folders(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    public_sets.image(tmp_path / "query" / composed / "0.jpg", 9)
    public_sets.image(tmp_path / "gallery" / decomposed / "0.jpg", 99)
    public_sets.image(tmp_path / "gallery" / "b" / "more" / "0.jpg", 150)
    public_sets.image(tmp_path / "gallery" / "b" / "._0.jpg", 150)
    found = benchmarks.load("folder", tmp_path)
    assert found.queries.labels.tolist() == [1] and found.gallery.labels.tolist() == [0, 1]
    assert "gallery/: hidden files and folders (1): b/._0.jpg" in found.protocol
    assert "b/more/0.jpg" in found.protocol


# ---- the command ---------------------------------------------------------------------------------


def test_help_lists_every_benchmark():
    for name in benchmarks.BENCHMARKS:
        assert name in (command.__doc__ or "")


def test_the_command_prints_and_writes_the_figures(tiny_finished, tmp_path, capsys):
    root = public_sets.revisited(tmp_path / "data")
    more = public_sets.image(tmp_path / "more" / "deep" / "0.jpg", 9)
    out = tmp_path / "out.json"
    words = [f"--run={tiny_finished}", "--benchmark=roxford5k", f"--path={root}", f"--out={out}"]
    assert command.main([*words, f"--distractors={more.parent.parent}"]) == 0
    printed = capsys.readouterr()
    content = json.loads(out.read_text())
    assert content["benchmark"] == "roxford5k"
    assert content["protocol"] in printed.err and "8 images and 1 distractors" in printed.err
    assert len(content["figures"]) == 12
    for figure in content["figures"]:
        assert 0 <= figure["value"] <= 1
        assert f"{100 * figure['value']:.1f}" in printed.out
        assert figure["part"] in printed.out and figure["name"] in printed.out


@pytest.mark.parametrize("name", ["gldv2", "gldv2_recognition", "inshop"])
def test_the_command_runs_every_form(tiny_finished, tmp_path, capsys, name):
    sample = public_sets.inshop if name == "inshop" else public_sets.gldv2
    words = [f"--run={tiny_finished}", f"--benchmark={name}", f"--path={sample(tmp_path)}"]
    assert command.main(words) == 0
    assert f"{name}, exact search" in capsys.readouterr().out


def refused(words, capsys):
    assert command.main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    return told


def test_errors_are_reported_before_the_run_is_loaded(tmp_path, capsys):
    def words(benchmark, path, *more):
        return [f"--run={tmp_path / 'no_run'}", f"--benchmark={benchmark}", f"--path={path}", *more]

    told = refused(words("roxford", tmp_path), capsys)
    assert "--benchmark='roxford' is unknown; did you mean 'roxford5k'?" in told
    assert f"--path='{tmp_path}/x' does not exist" in refused(
        words("gldv2", tmp_path / "x"), capsys
    )
    told = refused(words("rparis6k", tmp_path), capsys)
    assert f"{tmp_path}/gnd_rparis6k.pkl is missing: the ground truth of rparis6k" in told
    root = public_sets.revisited(tmp_path / "data")
    told = refused(words("roxford5k", root, f"--distractors={tmp_path / 'y'}"), capsys)
    assert f"--distractors='{tmp_path}/y' does not exist" in told
    (tmp_path / "empty").mkdir()
    told = refused(words("roxford5k", root, f"--distractors={tmp_path / 'empty'}"), capsys)
    assert f"{tmp_path}/empty: contains no images" in told
    assert "contains no run" in refused(words("roxford5k", root), capsys)


def test_a_malicious_pickle_is_not_executed(tmp_path, capsys):
    root = public_sets.revisited(tmp_path / "data")
    mark = tmp_path / "mark"
    text = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    (root / "gnd_roxford5k.pkl").write_bytes(text)
    words = [f"--run={tmp_path}", "--benchmark=roxford5k", f"--path={root}"]
    assert "it calls os.system, and only plain values are read" in refused(words, capsys)
    assert not mark.exists()


def test_a_damaged_image_is_named(tiny_finished, tmp_path, capsys):
    root = public_sets.revisited(tmp_path / "data")
    (root / "jpg" / "all_souls_000001.jpg").write_bytes(b"\xff\xd8nothing")
    words = [f"--run={tiny_finished}", "--benchmark=roxford5k", f"--path={root}"]
    told = command.main(words), capsys.readouterr().err
    assert told[0] == 2 and "all_souls_000001.jpg: cannot be read" in told[1].splitlines()[-1]
