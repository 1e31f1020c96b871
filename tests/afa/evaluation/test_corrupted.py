"""The benchmark of corrupted queries: figures by hand, images, files, errors, and the command."""

import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afa import load
from afa.config import DataConfig
from afa.data.corruptions import CORRUPTIONS
from afa.data.images import decode, evaluation_view
from afa.data.pipeline import eval_batches
from afa.data.types import Dataset, ImageSet
from afa.data.unseen import UNSEEN
from afa.errors import UserError
from afa.evaluation.benchmarks import corrupted, files
from afa.models.fusion import Fusion
from afa.workdir import Workdir
from experiments import evaluate as command

TRAINED = ("gaussian_noise", "gaussian_blur", "occlusion", "low_resolution")
CLASSES = ("apple", "pear, green")


def dataset(catalogue=True, gallery=None):
    """Two classes: images 0 1 2 and 3 4; catalogue images 5 and 6. Validation: without 1 and 5."""
    draw = np.random.default_rng(0)
    count = 7 if catalogue else 5
    pixels = [draw.integers(0, 256, (20, 24, 3), dtype=np.uint8) for _ in range(count)]
    labels = np.array([0, 0, 0, 1, 1, 0, 1])[:count]
    marks = np.arange(count) > 4
    names = tuple(f"photo {i}" for i in range(count))
    test = ImageSet(pixels, labels, names, marks, gallery)
    nothing = test.subset(np.zeros(0, np.int64))
    validation = test.subset(np.array([0, 2, 3, 4]))
    return Dataset("made up", nothing, validation, test, CLASSES, "", "0", "1")


def benchmark(groups=("held_back",), severities=(3, 5), data=None, **changes):
    found = corrupted.grouped(groups, TRAINED, changes.get("split", "test"))
    settings = DataConfig(image_size=16)
    return corrupted.define(data or dataset(), settings, found, severities, **changes)


def angles(degrees):
    turned = np.deg2rad(np.asarray(degrees, np.float64))
    return np.stack([np.cos(turned), np.sin(turned)], axis=1).astype(np.float32)


def scored(made, degrees_of):
    """Lines by (protocol, part, severity); vectors are directions in degrees."""

    def describe(index):
        return angles([degrees_of(made.rows[i]) for i in index])

    lines = corrupted.score(made.definition, made.rows, describe, lambda text: None)
    return {(line.protocol, line.part, line.severity): line for line in lines}


def values(line):
    return [line.figures[metric].value for metric in ("recall_at_1", "map_at_r")]


# Directions of the clean images; the classes are apart, the catalogue images in their middle.
PLACES = {"photo 0": 0, "photo 1": 2, "photo 2": 5, "photo 3": 90, "photo 4": 95, "photo 5": 3,
          "photo 6": 92}  # fmt: skip


# ---- figures -------------------------------------------------------------------------------------


def test_figures_by_hand():
    """Contrast turns photos 0 and 1 to 60 degrees (severity 3), and all to 90 (severity 5).

    Turned to 60 degrees, photo 0 finds 3 (at 90), 4, 2, 1: its two positives come third and
    fourth, so R@1 and MAP@R are 0; photo 1 finds 3, 4, 2, 0, likewise. At 90 degrees, photos 3
    and 4 find each other first, and photos 0 to 2 find the wrong class first.
    """
    made = benchmark()

    def direction(row):
        if row.corruption == "contrast" and (row.severity == 5 or row.image < "photo 2"):
            return 90 if row.severity == 5 else 60
        return PLACES[row.image]

    found = scored(made, direction)
    assert values(found["leave_one_out", "clean", 0]) == [1, 1]
    assert values(found["leave_one_out", "jpeg", 3]) == [1, 1]
    assert values(found["leave_one_out", "contrast", 3]) == pytest.approx([3 / 5, 3 / 5])
    assert values(found["leave_one_out", "contrast", 5]) == pytest.approx([2 / 5, 2 / 5])
    assert values(found["leave_one_out", "contrast", None]) == pytest.approx([1 / 2, 1 / 2])
    # One of six held-back corruptions.
    group = found["leave_one_out", "held_back", None]
    assert values(group) == pytest.approx([5.5 / 6, 5.5 / 6])
    rest = found["leave_one_out", "held_back without salt_pepper, contrast", None]
    assert values(rest) == [1, 1]
    assert values(found["leave_one_out", "salt_pepper", None]) == [1, 1]
    # 60 degrees is nearer to the catalogue image at 92 degrees than to that at 3.
    assert values(found["catalogue", "contrast", 3]) == pytest.approx([3 / 5, 3 / 5])
    assert values(found["catalogue", "clean", 0]) == [1, 1]
    # Resamples of two classes are one of them or both; the apples alone have 10, 10 and 11 of 12.
    interval = group.figures["recall_at_1"].interval
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((31 / 36, 1))
    assert group.figures["recall_at_1"].queries == 5


def test_a_partly_right_ranking_has_the_map_at_r_of_its_definition():
    """Photo 0 ranks 1, 3, 2, 4: with R = 2, MAP@R is (1/1 + 0) / 2."""
    made = benchmark(severities=(3,))
    places = PLACES | {"photo 2": 20, "photo 3": 10, "photo 4": 180}
    found = scored(made, lambda row: places[row.image])
    # 1 ranks 0 3 2: (1 + 0) / 2. 2 ranks 3 1 0: (0 + 1/2) / 2. 3 ranks 1: 0. 4 ranks 2: 0.
    clean = found["leave_one_out", "clean", 0]
    assert values(clean) == pytest.approx([2 / 5, (1 / 2 + 1 / 2 + 1 / 4) / 5])


def test_a_query_never_finds_its_own_clean_image():
    """A descriptor that only knows the image, not the class, finds nothing."""
    made = benchmark(severities=(3,))
    axes = np.eye(7, dtype=np.float32)

    def describe(index):
        return axes[[int(made.rows[i].image[-1]) for i in index]]

    lines = corrupted.score(made.definition, made.rows, describe, lambda text: None)
    clean = next(line for line in lines if line.part == "clean")
    assert clean.protocol == "leave_one_out"
    # All other images are equally similar, and the first row wins: photo 1 for photo 0, else 0.
    assert clean.figures["recall_at_1"].value == pytest.approx(3 / 5)


def test_queries_of_the_data_set_are_searched_in_its_gallery():
    inside = np.array([False, True, True, False, True, False, False])
    made = benchmark(data=dataset(gallery=inside))
    assert made.definition.protocols == {"gallery": "query_gallery", "catalogue": "catalogue"}
    images = {role: [row.image for row in made.rows if row.role == role and not row.severity]
              for role in ("query", "gallery", "catalogue")}  # fmt: skip
    assert images == {"query": ["photo 0", "photo 3"], "catalogue": ["photo 5", "photo 6"],
                      "gallery": ["photo 1", "photo 2", "photo 4"]}  # fmt: skip
    only = benchmark(data=dataset(gallery=inside), protocol="catalogue")
    assert only.definition.protocols == {"catalogue": "catalogue"}
    assert not [row for row in only.rows if row.role == "gallery"]
    assert list(benchmark(data=dataset(catalogue=False)).definition.protocols) == ["gallery"]


# ---- images --------------------------------------------------------------------------------------


def test_the_images_are_those_of_the_robustness_test_and_the_same_every_time():
    first, second = (benchmark(None, queries=4) for _ in range(2))
    assert first.rows == second.rows and first.definition == second.definition
    assert first.definition.queries == 4
    for one, other in zip(first.images, second.images, strict=True):
        np.testing.assert_array_equal(one, other)
    test = dataset().test
    for name in CORRUPTIONS:
        at = [i for i, row in enumerate(first.rows) if row[3:5] == (name, 5)]
        index = np.array([int(first.rows[i].image[-1]) for i in at])
        settings = DataConfig(image_size=16)
        expected = np.concatenate(list(eval_batches(test.subset(index), settings, 8, (name, 5))))
        np.testing.assert_array_equal(np.stack([first.images[i] for i in at]), expected)
    clean = [i for i, row in enumerate(first.rows) if not row.corruption]
    for i in clean:
        image = test.images[int(first.rows[i].image[-1])]
        np.testing.assert_array_equal(first.images[i], evaluation_view(image, 16, 1.0))


def test_all_groups_and_severities_are_listed():
    made = benchmark(None, (1, 4))
    listed = {(row.corruption, row.severity) for row in made.rows if row.role == "query"}
    every = {(name, s) for name in (*CORRUPTIONS, *UNSEEN) for s in (1, 4)}
    assert listed == every | {("", 0)}
    assert len({row.id for row in made.rows}) == len(made.rows) == 5 + 2 + 5 * len(listed)


# ---- files ---------------------------------------------------------------------------------------


def test_written_images_and_definition_are_read_again(tmp_path):
    made = benchmark(severities=(3,))
    files.write(tmp_path / "out", made)
    definition, rows = files.read(tmp_path / "out")
    assert definition == made.definition and rows == made.rows
    for row, pixels in zip(rows, made.images, strict=True):
        np.testing.assert_array_equal(decode((tmp_path / "out" / row.id).read_bytes()), pixels)
    written = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")
    }
    assert written == {row.id for row in rows}
    assert any(row.label == "pear, green" for row in rows)
    with pytest.raises(UserError, match=r"--write=.*out: is not empty"):
        files.write(tmp_path / "out", made)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--write=.*file: cannot be written"):
        files.write(tmp_path / "file", made)


def saved(path, ids, vectors):
    if path.suffix == ".npz":
        np.savez(path, ids=np.array(ids), vectors=vectors)
    else:
        lists = [None if row is None else list(map(float, row)) for row in vectors]
        pq.write_table(pa.table({"id": list(ids), "embedding": lists}), path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_vectors_are_read_in_any_order_and_scaled(tmp_path, suffix):
    rows = benchmark(severities=(3,)).rows
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(len(rows) + 2, 4)).astype(np.float32) * 7
    ids = [*(row.id for row in rows), "query/of/another.png", "more"]
    order = draw.permutation(len(ids))
    path = saved(tmp_path / f"v{suffix}", [ids[i] for i in order], vectors[order])
    expected = vectors[:-2] / np.linalg.norm(vectors[:-2], axis=1, keepdims=True)
    np.testing.assert_allclose(files.read_vectors(path, rows), expected, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_unusable_vectors_are_refused(tmp_path, suffix):
    rows = benchmark(severities=(3,)).rows
    ids = [row.id for row in rows]
    good = np.ones((len(rows), 4), np.float32)

    def told(ids, vectors, name="v"):
        with pytest.raises(UserError) as error:
            files.read_vectors(saved(tmp_path / f"{name}{suffix}", ids, vectors), rows)
        assert str(error.value).startswith(f"--vectors={tmp_path}/{name}{suffix}: ")
        return str(error.value)

    assert (
        f"lacks 2 of {len(rows)} ids (first: 'gallery/000000.png'; an id of the file: 'gallery"
        in (told(ids[2:], good[2:]))
    )
    assert "must be unique, but 'gallery/000000.png' appears twice" in told(
        [ids[0], *ids], np.concatenate([good[:1], good])
    )
    bad = good.copy()
    bad[5, 2] = np.nan
    assert "1 of 42 rows hold NaN or infinity (first: row 5)" in told(ids, bad)
    bad[5] = 0
    assert f"the vector of {ids[5]!r} is zero" in told(ids, bad)


def test_unusable_files_of_vectors_are_refused(tmp_path):
    rows = benchmark(severities=(3,)).rows
    ids = [row.id for row in rows]

    def told(path):
        with pytest.raises(UserError) as error:
            files.read_vectors(path, rows)
        return str(error.value)

    text = tmp_path / "v.txt"
    assert told(text) == f"--vectors={text}: its suffix must be .npz or .parquet"
    for suffix in (".npz", ".parquet"):
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(b"no such format")
        assert "cannot be read (" in told(path)
    np.savez(tmp_path / "a.npz", ids=np.array(ids))
    assert "cannot be read (" in told(tmp_path / "a.npz") and "vectors" in told(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", ids=np.array(ids), vectors=np.ones(len(ids)))
    assert "must have the shape (rows, dimensions), not (42,)" in told(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", ids=np.array(ids), vectors=np.ones((9, 2)))
    assert "42 ids for 9 vectors" in told(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", ids=np.array(ids), vectors=np.ones((42, 2), np.int64))
    assert "must be real numbers, not int64" in told(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", ids=np.array(ids, object), vectors=np.ones((42, 2)))
    assert "cannot be read (Object arrays" in told(tmp_path / "e.npz")
    uneven = [[1.0] * (2 + (i == 3)) for i in range(len(ids))]
    saved(tmp_path / "f.parquet", ids, uneven)
    assert "vectors of 2 dimensions: [2, 3]" in told(tmp_path / "f.parquet")


def test_a_damaged_manifest_is_refused(tmp_path):
    made = benchmark(severities=(3,))
    files.write(tmp_path / "out", made)
    path = tmp_path / "out" / files.MANIFEST
    lines = path.read_text().splitlines()

    def told(changed):
        path.write_text("\n".join(changed) + "\n")
        with pytest.raises(UserError) as error:
            definition, rows = files.read(tmp_path / "out")
            corrupted.score(definition, rows, lambda i: angles(np.zeros(len(i))), print)
        return str(error.value)

    assert "its first line must be id,class,role" in told(lines[1:])
    wrong = [line.replace(",contrast,", ",contarst,") for line in lines]
    assert "corruption='contarst' is unknown; did you mean 'contrast'?" in told(wrong)
    wrong = [line.replace(",gallery,", ",galery,") for line in lines]
    assert "line 2: role='galery' is unknown; did you mean 'gallery'?" in told(wrong)
    assert "line 2: is not id,class," in told([lines[0], lines[1].replace(",0,", ",,"), *lines[2:]])
    left = [line for line in lines if ",contrast," not in line]
    assert "the list of images has no query contrast 3 rows" in told(left)
    one = next(line for line in lines if ",contrast," in line)
    shorter = [line for line in lines if line != one]
    assert "the queries of contrast 3 are not the clean ones" in told(shorter)
    (tmp_path / "out" / files.DEFINITION).write_text("{}")
    assert "benchmark.json: is not a definition of the benchmark" in told(lines)


# ---- choices -------------------------------------------------------------------------------------


def test_groups_are_disjoint_and_checked():
    found = corrupted.grouped(None, TRAINED)
    names = [name for group in found.values() for name in group]
    assert sorted(names) == sorted([*CORRUPTIONS, *UNSEEN])
    assert list(corrupted.grouped(["unseen", "held_back"], tuple(CORRUPTIONS))) == ["unseen"]
    for groups, trained, message in (
        (["unsen"], TRAINED, "--groups='unsen' is unknown; did you mean 'unseen'?"),
        (["trained"], ("jpg",), "data.corruptions='jpg' is unknown; did you mean 'jpeg'?"),
        (["trained"], ("blue_noise",), "data.corruptions='blue_noise' is an unseen corruption"),
        (["held_back"], tuple(CORRUPTIONS), "--groups=held_back: there are no such corruptions"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            corrupted.grouped(groups, trained)


def test_choices_are_made_on_validation_classes():
    """With the usual corruptions, apart those that were not trained on; no others."""
    found = corrupted.grouped(None, TRAINED[1:], "validation")
    assert found == {"trained": TRAINED[1:], "left_out": TRAINED[:1]}
    for groups, split, message in (
        (["held_back"], "validation", "does not go with --split=validation (allowed: trained, "),
        (["left_out"], "test", "--groups=left_out does not go with --split=test"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            corrupted.grouped(groups, TRAINED, split)
    made = benchmark(None, split="validation")
    assert {row.image for row in made.rows} == {f"photo {i}" for i in (0, 2, 3, 4)}
    assert (made.definition.split, made.definition.fingerprint) == ("validation", "0")


def test_severities_queries_and_protocols_are_checked():
    assert corrupted.check_severities([5, 3, 5]) == (3, 5)
    for wrong in ([], [0], [3, 6]):
        with pytest.raises(UserError, match="must lie between 1 and 5"):
            corrupted.check_severities(wrong)
    with pytest.raises(UserError, match="--queries=-1 must not be negative"):
        benchmark(queries=-1)
    with pytest.raises(UserError, match="--protocol='catalog' is unknown; did you mean 'catalogue"):
        benchmark(protocol="catalog")
    with pytest.raises(UserError, match="--protocol='catalogue' needs catalogue images"):
        benchmark(data=dataset(catalogue=False), protocol="catalogue")


# ---- the command ---------------------------------------------------------------------------------


def words(*more, **options):
    named = [f"--{name}={value}" for name, value in options.items()]
    return ["--benchmark=corrupted_queries", *named, *more]


def refused(line, capsys):
    assert command.main([str(word) for word in line]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    return told


def figures(path):
    return [
        (line["protocol"], line["part"], line["severity"], metric, line[metric]["value"])
        for line in json.loads(path.read_text())["lines"]
        for metric in ("recall_at_1", "map_at_r")
    ]


def test_a_run_and_the_vectors_of_its_written_images_have_the_same_figures(
    tiny_copy, tmp_path, capsys
):
    options = ["--severities", "3", "--groups", "held_back", "unseen"]
    before = Workdir(tiny_copy).test_reads()
    out = tmp_path / "run.json"
    assert command.main(words(*options, run=tiny_copy, out=out)) == 0
    printed = capsys.readouterr()
    assert Workdir(tiny_copy).test_reads() == before + 1
    assert json.loads((tiny_copy / "test_reads.json").read_text())["corrupted_queries"] == 1
    content = json.loads(out.read_text())
    assert content["definition"]["queries"] == 24
    assert list(content["definition"]["groups"]) == ["held_back", "unseen"]
    stored = json.loads((tiny_copy / "result.json").read_text())
    assert content["cost"]["relative_operations"] == stored["metrics"]["test"]["fused"]["cost"]
    fusion = Fusion.from_json(stored["metrics"]["test"]["fused"]["fusion"])
    assert content["cost"]["fusion"] == fusion.text()
    assert "search cost: dimension" in printed.err
    for name in (*UNSEEN, "contrast", "held_back without salt_pepper, contrast"):
        assert name in printed.out
    assert "leave_one_out" in printed.out and "catalogue" in printed.out

    written = tmp_path / "written"
    assert command.main(words(*options, run=tiny_copy, write=written)) == 0
    assert Workdir(tiny_copy).test_reads() == before + 1  # nothing was evaluated
    with (written / "manifest.csv").open(newline="") as file:
        ids = [line["id"] for line in csv.DictReader(file)]
    vectors = load(tiny_copy).embed([written / each for each in ids])
    content["cost"]["dimension"] = vectors.shape[1]
    for suffix in (".npz", ".parquet"):
        path, again = saved(tmp_path / f"v{suffix}", ids, vectors), tmp_path / f"{suffix}.json"
        assert command.main(words(path=written, vectors=path, out=again)) == 0
        for one, other in zip(figures(out), figures(again), strict=True):
            assert one[:4] == other[:4] and one[4] == pytest.approx(other[4], abs=1e-6), one
        assert json.loads(again.read_text())["definition"] == content["definition"]
    data = json.loads((tiny_copy / "config.json").read_text())["config"]["data"]
    fields = {f"data.{name}": data[name] for name in ("name", "path", "image_size")}
    again = tmp_path / "data.json"
    assert command.main(words(*options, vectors=tmp_path / "v.npz", out=again, **fields)) == 0
    assert figures(again) == figures(tmp_path / ".npz.json")


def test_the_clean_and_the_corrupted_figures_are_those_of_the_run(tiny_copy, tmp_path, capsys):
    """The robustness test of the run drew 8 queries at severity 3 with the same seed."""
    options = ["--severities=3", "--groups", "trained", "held_back", "--queries=8"]
    out = tmp_path / "out.json"
    assert command.main(words(*options, run=tiny_copy, out=out)) == 0
    stored = json.loads((tiny_copy / "result.json").read_text())["metrics"]["test"]["fused"]
    for protocol, part, severity, metric, value in figures(out):
        if part in CORRUPTIONS and severity:
            expected = stored[protocol]["corruptions"][part]["3"][metric]
        elif part in ("trained", "held_back"):
            expected = stored[protocol][part][metric]
        else:
            continue
        assert value == pytest.approx(expected, abs=1e-6), (part, metric)
    again = tmp_path / "again.json"
    assert command.main(words(*options, run=tiny_copy, out=again, format="markdown")) == 0
    assert figures(again) == figures(out)
    assert "| queries (leave_one_out) | severity | R@1 % |" in capsys.readouterr().out


def test_validation_classes_do_not_count_as_a_read(tiny_copy, tmp_path, capsys):
    reads, out = Workdir(tiny_copy).test_reads(), tmp_path / "out.json"
    options = ["--split=validation", "--severities=3"]
    assert command.main(words(*options, run=tiny_copy, out=out)) == 0
    assert Workdir(tiny_copy).test_reads() == reads
    assert "validation classes" in capsys.readouterr().out
    assert "held_back" not in {line["group"] for line in json.loads(out.read_text())["lines"]}
    written = tmp_path / "written"
    assert command.main(words(*options, run=tiny_copy, write=written)) == 0
    assert files.read(written)[0].split == "validation"


def test_images_of_another_size_are_embedded_as_any_others(tiny_copy, tmp_path):
    out = tmp_path / "out.json"
    options = ["--severities=3", "--groups=unseen", "--queries=4", "--data.image_size=24"]
    assert command.main(words(*options, run=tiny_copy, out=out)) == 0
    assert json.loads(out.read_text())["definition"]["image_size"] == 24


def test_mistakes_on_the_command_line_are_told_in_one_line(tiny_finished, tmp_path, capsys):
    run = {"run": tiny_finished}
    vectors = tmp_path / "v.npz"
    np.savez(vectors, ids=np.array(["a"]), vectors=np.ones((1, 2)))
    (tmp_path / "empty").mkdir()
    for line, message in (
        (words(), "--benchmark=corrupted_queries needs --run, --vectors or --write"),
        (words(vectors=vectors), "needs --run or --data.name"),
        (words(**run, vectors=vectors), "--vectors and --run exclude each other"),
        (words(**run, write=tmp_path / "x", out=tmp_path / "y"), "--write and --out exclude"),
        (words(**run, path=tmp_path), "--path: corrupted_queries reads the data set of --data"),
        (words("--queries=3", vectors=vectors, path=tmp_path), "--queries: "),
        (words(vectors=vectors, path=tmp_path / "empty"), "benchmark.json: is not a definition"),
        (words(vectors=tmp_path / "no.npz", path=tmp_path), "there is no such file"),
        (words("--split=train", **run), "--split='train' is unknown"),
        (words("--split=validation", "--groups=unseen", **run), "does not go with --split=valid"),
        (words("--groups", "unsen", **run), "did you mean 'unseen'?"),
        (words("--severities", "3", "7", **run), "--severities=3 7 must lie between 1 and 5"),
        (words("--severities=x", **run), "--severities='x' is not a whole number"),
        (words("--data.corruptions=jpeg", **run), "--data.corruptions: the run was trained on"),
        (words("--data.imagesize=9", **run), "did you mean '--data.image_size'?"),
        (words("--data.image_size=a", **run), "data.image_size='a'"),
        (words("--data.image_size=0", **run), "data.image_size=0 must be above 0"),
        (words("--format=word", **run), "--format='word' is unknown"),
        (words("--distractors=x", **run), "--distractors: corrupted_queries takes none"),
        (words("--data.name=foldr", write=tmp_path / "x"), "did you mean 'folder'?"),
        (words(run=tmp_path / "empty"), "contains no run"),
        (words(run=tmp_path / "empty", write=tmp_path / "x"), "contains no run"),
        (["--benchmark=corrupted_query", f"--run={tiny_finished}"], "'corrupted_queries'?"),
        (["--benchmark=inshop", f"--run={tiny_finished}"], "--path is missing"),
        (["--benchmark=inshop", "--queries=3"], "--queries is an option of --benchmark=corrupted"),
        (["--benchmark=inshop", "--data.name=x"], "--data.name is an option of --benchmark=corr"),
    ):  # fmt: skip
        assert message in refused(line, capsys), line
    assert not (tmp_path / "x").exists()


def test_a_read_is_not_counted_when_the_command_fails(tiny_copy, capsys):
    reads = Workdir(tiny_copy).test_reads()
    assert "needs images that the data set" in refused(
        words("--protocol=query_gallery", run=tiny_copy), capsys
    )
    assert Workdir(tiny_copy).test_reads() == reads
