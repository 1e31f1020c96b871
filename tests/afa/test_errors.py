"""Bad input: one-line error, exit code, and no partially written files."""

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import afa
from afa import io, losses, parallel
from afa.config import with_changes
from afa.errors import EXIT_DIVERGED, EXIT_USER_ERROR, UserError
from afa.evaluation.evaluator import Evaluator, Results
from afa.evaluation.variants import Variant
from afa.models.fusion import Fusion
from afa.report.page import Page
from afa.retrieval import export
from afa.runs import run as job
from afa.train import checkpoint
from afa.train.state import TrainState
from experiments import run as command

Usage = namedtuple("Usage", "total used free")
DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def refused(tiny_data, tmp_path, capsys, monkeypatch):
    """Returns a function that checks the error line of a tiny run, and that no file changed."""
    monkeypatch.chdir(tmp_path)

    def check(line, *extra, data=tiny_data, home=tmp_path / "run", code=EXIT_USER_ERROR, **changes):
        before = tiny_run.listing(tmp_path)
        assert tiny_run.main(*tiny_run.words(data, home, **changes), *extra) == code
        assert capsys.readouterr().err == f"error: {line}\n"
        assert tiny_run.listing(tmp_path) == before

    return check


EXPERIMENTS = ", ".join(command.configs.names())  # tested in test_run
CORRUPTIONS = (
    "clutter, contrast, gaussian_blur, gaussian_noise, jpeg, low_resolution, motion_blur, "
    "occlusion, salt_pepper, stripes"
)
LOSSES = ", ".join(sorted(losses.LOSSES))  # spelled out in test_losses
NO_DURATION = 'is not a duration (allowed: "500", "20ep", "40%")'


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("exp", "debugg",
         f"exp='debugg' is unknown; did you mean 'debug'? (allowed: {EXPERIMENTS})"),
        ("exp", "", f"--exp is missing (allowed: list, {EXPERIMENTS})"),
        ("data.image_sise", 3,
         "--data.image_sise is not a field; did you mean 'data.image_size'? (--help lists all)"),
        ("scale", "big", "scale='big' is unknown (allowed: auto, full, laptop)"),
        ("data.name", "foldr",
         "data.name='foldr' is unknown; did you mean 'folder'? (allowed: synthetic, folder, "
         "gldv2, inshop, tfds:NAME)"),
        ("loss.name", "tripplet",
         f"loss.name='tripplet' is unknown; did you mean 'triplet'? (allowed: {LOSSES})"),
        ("backbone.name", "resnet51",
         "backbone.name='resnet51' is unknown; did you mean 'resnet50'? "
         f"(allowed: {', '.join(sorted(tiny_run.backbones.MEMBERS))})"),
        ("evaluation.views", "flop",
         "evaluation.views='flop' is unknown; did you mean 'flip'? (allowed: clahe, flip, "
         "median, standardise, zoom)"),
        ("data.corruptions", "gaussian_nois",
         "data.corruptions='gaussian_nois' is unknown; did you mean 'gaussian_noise'? (allowed: "
         f"{CORRUPTIONS})"),
        ("optim.name", "adam",
         "optim.name='adam' is unknown; did you mean 'adamw'? (allowed: adamw, lamb, lion, sgd)"),
        ("retrieval.index", "scan://",
         "retrieval.index='scan' is unknown; did you mean 'scann'? (allowed: exact, milvus, "
         "scann)"),
        ("retrieval.tune_for", "batches",
         "retrieval.tune_for='batches' is unknown; did you mean 'batch'? (allowed: batch, "
         "single)"),
    ],
)  # fmt: skip
def test_unknown_names_get_the_nearest(field, value, line, refused):
    refused(line, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("data.image_size", "abc", "data.image_size='abc' is not a whole number"),
        ("seed", "1.5", "seed='1.5' is not a whole number"),
        ("optim.clip", "a", "optim.clip='a' is not a number"),
        ("data.flip", "maybe", "data.flip='maybe' is unknown (allowed: True, False)"),
        ("evaluation.severities", "a",
         "evaluation.severities='a' is not a list of values separated by spaces"),
        ("evaluation.severities", (0, 3),
         "evaluation.severities=(0, 3) must lie in [1, 5]"),
        ("evaluation.severities", (), "evaluation.severities=() must be some of 1, 2, 3, 4, 5"),
        ("data.image_size", 0, "data.image_size=0 must be above 0"),
        ("data.image_size", 18,
         "data.image_size=18 must be a multiple of 4 (2**max(generator.levels, "
         "discriminator.levels))"),
        ("loss.temperature", "nan", "loss.temperature=nan must be finite"),
        ("data.crop_fraction", 2, "data.crop_fraction=2.0 must lie in (0, 1]"),
        ("data.max_unreadable", 2, "data.max_unreadable=2.0 must lie in [0, 1]"),
        ("data.read_threads", -1, "data.read_threads=-1 must not be negative"),
        ("optim.ema_decay", 1, "optim.ema_decay=1.0 must lie in [0, 1)"),
        ("train.steps", "soon", f"train.steps='soon' {NO_DURATION}"),
        ("train.log_every", "-3", f"train.log_every='-3' {NO_DURATION}"),
        ("optim.warmup", "nan%", f"optim.warmup='nan%' {NO_DURATION}"),
        ("launch.coordinator", "host:1",
         "launch.coordinator needs launch.processes and launch.index, two numbers"),
    ],
)  # fmt: skip
def test_bad_values_name_field_and_value(field, value, line, refused):
    refused(line, **{field: value})


def test_positional_arguments_are_refused(refused):
    refused("'word' is not a field (fields are written --FIELD=VALUE)", "word")
    refused("'-x' is not a field (fields are written --FIELD=VALUE)", "-x")


def test_run_raises_the_same_messages():
    with pytest.raises(UserError, match=r"image_sise is not a field; did you mean 'data\.image_s"):
        afa.run("debug", **{"data.image_sise": 3})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="exp='debugg' is unknown"):
        afa.run("debugg")


# ---- data ----------------------------------------------------------------------------------------


def test_folders_without_data(refused, tmp_path):
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    refused(f"data.path='{nowhere}' does not exist", data=nowhere)
    refused("data.path is empty, and data.name='folder' needs a directory", data="")
    refused(
        f"data.path='{empty}' contains no class folders with images (expected DIR/CLASS/IMAGE, or "
        "DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE)",
        data=empty,
    )


def test_classes_with_too_few_images(refused, tmp_path):
    tiny_run.images(tmp_path / "data", classes=12, count=1)
    shutil.rmtree(tmp_path / "data" / "iconic")
    refused(
        "data: class 'class_00' has 1 readable image, and at least 2 are needed in every class: "
        "add some, or remove the class",
        data=tmp_path / "data",
    )


def test_too_few_classes_for_the_sampler(refused):
    refused(
        "data.batch_size=16 with data.images_per_class=2 needs 8 training classes, and there are "
        "4: use a batch of at most 8",
        **{"data.batch_size": 16},
    )
    refused(
        "data.batch_size=7 must be a multiple of data.images_per_class=2",
        **{"data.batch_size": 7},
    )
    refused(
        "data.batch_size=64 is more than the 20 training images",
        **{"data.batch_size": 64, "data.sampler": "shuffle"},
    )


def test_a_batch_that_does_not_fit_the_devices(refused, monkeypatch):
    monkeypatch.setattr(parallel, "device_count", lambda: 3)
    refused("data.batch_size=8 cannot be divided among 3 devices")


def damage(data, count):
    """Truncates some training images; returns their ids."""
    corrupted = sorted(data.glob("train/*/*.jpg"))[:count]
    for path in corrupted:
        path.write_bytes(path.read_bytes()[:200])
    return [path.relative_to(data).as_posix() for path in corrupted]


def test_many_unreadable_images_are_refused(refused, tmp_path):
    data = tiny_run.images(tmp_path / "data")
    names = damage(data, 4)
    before = tiny_run.listing(tmp_path)
    with pytest.raises(UserError) as error:
        job.build_setup(tiny_config(data))
    line = str(error.value)
    assert line.startswith(f"data.path='{data}': 4 of 60 images (6.7%) cannot be read, above ")
    assert f"data.max_unreadable=0.01: {names[0]}: " in line
    assert line.endswith(", and 1 more") and "\n" not in line
    assert tiny_run.listing(tmp_path) == before
    refused(line, data=data)


def test_few_unreadable_images_are_listed_and_skipped(tmp_path):
    data = tiny_run.images(tmp_path / "data")
    (name,) = damage(data, 1)
    ready = job.build_setup(with_changes(tiny_config(data), **{"data.max_unreadable": 0.1}))
    assert [each.partition(": ")[0] for each in ready.dataset.skipped] == [name]
    assert name not in ready.dataset.everything().ids
    assert f"skipped   {ready.dataset.skipped[0]}" in job.describe(ready)


def test_an_image_deleted_during_training(tiny_data, tmp_path, capfd):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    ready = job.build_setup(tiny_config(data))
    shutil.rmtree(data / "train")
    with pytest.raises(UserError, match=r"train/class_0\d/img_\d.jpg: cannot be read"):
        list(ready.pipeline.iterate(0, 3))


def tiny_config(data):
    return command.parse(tiny_run.words(data, "nowhere"))


# ---- retrieval -----------------------------------------------------------------------------------


def test_more_results_than_images(refused):
    refused(
        "retrieval.results=31 is more than the 30 images of the gallery (retrieval.gallery='test')",
        **{"retrieval.results": 31},
    )


def test_a_catalogue_protocol_without_catalogue_images(refused, tmp_path):
    data = tiny_run.images(tmp_path / "data")
    shutil.rmtree(data / "iconic")
    refused(
        "evaluation.protocol='catalogue' needs catalogue images, and the test classes have none",
        data=data,
        **{"evaluation.protocol": "catalogue"},
    )


def test_scann_where_it_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    refused(
        "scann:// cannot be used (import of scann halted; None in sys.modules): install scann "
        "(Linux, Python below 3.14), or use exact://",
        **{"retrieval.index": "scann://"},
    )


def test_embeddings_that_are_not_finite(tiny_data, tiny_copy, monkeypatch, capsys):
    restore = checkpoint.Checkpoints.restore

    def poisoned(self, *args):
        state, position = restore(self, *args)
        return poison(state), position

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", poisoned)
    before = tiny_run.listing(tiny_copy)
    assert tiny_run.main(*tiny_run.words(tiny_data, tiny_copy)) == EXIT_USER_ERROR
    assert capsys.readouterr().err == (
        "error: gallery: rows must be finite, but row 0 has length nan\n"
    )
    changed = tiny_run.listing(tiny_copy).items() - before.items()
    assert {name for name, _ in changed} == {"split.json"}


def poison(state):
    """A NaN in the last layer of F, also in its average."""

    def corrupted(tree):
        params = tree["embedder"]["params"]
        last = jax.tree.map(lambda x: x * jnp.nan, params["global_head"]["linear"])
        head = {"global_head": params["global_head"] | {"linear": last}}
        embedder = tree["embedder"] | {"params": params | head}
        return tree | {"embedder": embedder}

    return state.replace(variables=corrupted(state.variables), average=corrupted(state.average))


# ---- the run directory ---------------------------------------------------------------------------


def test_a_directory_with_another_configuration(refused, tiny_copy):
    refused(
        f"--workdir={tiny_copy} contains a run with another configuration: seed: 0 -> 1; "
        "optim.learning_rate: 0.001 -> 0.5 (choose another --workdir, or the stored values)",
        home=tiny_copy,
        **{"optim.learning_rate": 0.5, "seed": 1},
    )


def test_a_checkpoint_with_another_configuration(tiny_data, tiny_copy, capsys):
    """Without the configuration file, the checkpoint is compared."""
    (tiny_copy / "config.json").unlink()
    before = tiny_run.listing(tiny_copy / "checkpoints")
    assert tiny_run.main(*tiny_run.words(tiny_data, tiny_copy, seed=1)) == EXIT_USER_ERROR
    assert capsys.readouterr().err == (
        "error: the checkpoint of step 12 was written with another configuration: seed: 0 -> 1 "
        "(choose another --workdir, or the stored values)\n"
    )
    assert tiny_run.listing(tiny_copy / "checkpoints") == before


def test_other_images_than_those_of_the_run(refused, tiny_copy, tmp_path):
    data = tiny_run.images(tmp_path / "others", seed=1)
    stored = json.loads((tiny_copy / "split.json").read_text())["fingerprint"]
    now = job.build_setup(tiny_config(data)).dataset.fingerprint
    refused(
        f"--workdir={tiny_copy} contains a run on other images: fingerprint {stored[:12]} -> "
        f"{now[:12]} (choose another --workdir, or restore the data set)",
        data=data,
        home=tiny_copy,
    )


def test_a_second_run_in_a_locked_directory(refused, tmp_path):
    home = tmp_path / "run"
    home.mkdir()
    with io.locked(home / ".lock"):
        refused(
            f"--workdir={home}: another run is using it (choose another directory, or wait "
            "until it ends)"
        )


def test_a_directory_that_cannot_be_created(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        f"--workdir={tmp_path / 'file'}: cannot be created (File exists)", home=tmp_path / "file"
    )
    refused(
        f"--workdir={tmp_path / 'file' / 'run'}: cannot be created (Not a directory)",
        home=tmp_path / "file" / "run",
    )


# ---- a full disk ---------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise DISK_FULL


CANNOT_WRITE = (
    "cannot be written (No space left on device); fix this and run the same command again to "
    "continue"
)


def test_no_room_for_a_checkpoint(tiny_data, tmp_path, monkeypatch, capsys):
    home = tmp_path / "run"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 2**30, 3 * 2**18))
    assert tiny_run.main(*tiny_run.words(tiny_data, home)) == EXIT_USER_ERROR
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: checkpoint of step 2 needs 1.") and stderr.count("\n") == 1
    assert stderr.endswith(
        f" MiB and 0.8 MiB are free in {home}/checkpoints; free some space and run the same "
        "command again to continue from the last checkpoint\n"
    )
    assert not list((home / "checkpoints").iterdir())


@pytest.mark.parametrize("error", [DISK_FULL, ValueError("RESOURCE_EXHAUSTED: disk\nmore")])
def test_a_checkpoint_that_cannot_be_written(error, tmp_path, monkeypatch):
    """For example because of a quota, for which TensorStore raises a ValueError."""
    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {}, {})
    config = tiny_config(tmp_path)
    position = checkpoint.Position(4, 1.0)
    with checkpoint.Checkpoints(tmp_path, 1) as saved:

        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(saved._manager, "save", fail)
        monkeypatch.setattr(saved, "_check_space", lambda *args: None)
        with pytest.raises(UserError) as caught:
            saved.save(state, position, config, None)
    reason = str(error).splitlines()[0]
    assert str(caught.value) == f"checkpoint of step 4 could not be written: {reason}"


@pytest.mark.parametrize("name", ["config.json", "split.json"])
def test_no_room_to_start(name, tiny_data, tmp_path, monkeypatch, capsys):
    home, write = tmp_path / "run", io.write_atomically
    monkeypatch.setattr(
        io, "write_atomically", lambda p, w: full() if p.name == name else write(p, w)
    )
    assert tiny_run.main(*tiny_run.words(tiny_data, home)) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"error: --workdir={home}: {CANNOT_WRITE}\n"
    assert {p.name for p in home.iterdir()} <= {".lock", "config.json"}


@pytest.fixture
def evaluated(monkeypatch):
    """Skips evaluation and report, to test the files written after them."""
    row = Variant("fused", "trained", Fusion.of({"global": 1.0}), 1.0)
    texts = ("title", "experiment", "dataset", "protocol", "hardware", "date", "commit")
    page = Page(**dict.fromkeys(texts, ""), seeds=(), train_seconds=0, parameters={})
    monkeypatch.setattr(Evaluator, "variants", lambda self, variables, initial: [row])
    monkeypatch.setattr(Evaluator, "test", lambda *args: Results({}, {"variant": []}))
    monkeypatch.setattr(job.restoration, "measure", lambda *args: {})
    monkeypatch.setattr(job.report_page, "page", lambda *args: page)
    monkeypatch.setattr(job, "write_report", lambda *args: None)


def test_no_room_for_the_export(evaluated, tiny_data, tiny_copy, monkeypatch, capsys):
    before = tiny_run.listing(tiny_copy / "embeddings")
    monkeypatch.setattr(export.pq, "write_table", full)
    assert tiny_run.main(*tiny_run.words(tiny_data, tiny_copy)) == EXIT_USER_ERROR
    assert capsys.readouterr().err == (
        f"error: cannot write {tiny_copy}/embeddings: No space left on device; its content is "
        "unchanged\n"
    )
    assert tiny_run.listing(tiny_copy / "embeddings") == before


@pytest.mark.parametrize("name", ["per_query.parquet", "result.json"])
def test_no_room_for_the_result(name, evaluated, tiny_data, tiny_copy, monkeypatch, capsys):
    before = (tiny_copy / "result.json").read_bytes()
    write = io.write_atomically

    def some(path, content):
        write(path, full if path.name == name else content)

    monkeypatch.setattr(io, "write_atomically", some)
    assert tiny_run.main(*tiny_run.words(tiny_data, tiny_copy)) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"error: --workdir={tiny_copy}: {CANNOT_WRITE}\n"
    assert (tiny_copy / "result.json").read_bytes() == before
    assert not list(tiny_copy.glob("*.tmp")) + list(tiny_copy.glob(".*.tmp"))


def test_a_full_file_system(tiny_data, tmp_path):
    """On a temporary file system that is too small for the second checkpoint."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        words = tiny_run.words(tiny_data, small / "run", **{"data.path": str(tiny_data)})
        code, _, err = tiny_run.finish(tiny_run.start(*words))
        assert code == EXIT_USER_ERROR
        assert err.startswith("error: checkpoint of step ") and err.count("\n") == 1
        checkpoints = small / "run" / "checkpoints"
        assert all(path.name.isdecimal() for path in checkpoints.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---- training that diverges ----------------------------------------------------------------------


def poisoned_steps(monkeypatch, before=0, after=0):
    """Sets parameters of F to NaN before or after this step."""
    mapped = parallel.data_parallel

    def data_parallel(step, impl):
        run = mapped(step, impl)

        def taken(state, batch):
            number = int(np.asarray(state.step)) + 1
            state = poison(state) if number == before else state
            state, metrics = run(state, batch)
            return poison(state) if number == after else state, metrics

        return taken

    monkeypatch.setattr(parallel, "data_parallel", data_parallel)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ({"before": 7}, "step 7: metric_loss is not finite; training stopped, last good "
                        "checkpoint: step 6"),
        ({"after": 8}, "step 8: average/embedder/params/global_head/linear/bias is not finite; "
                       "training stopped, last good checkpoint: step 6"),
        ({"before": 1}, "step 1: metric_loss is not finite; training stopped, no checkpoint was "
                        "written"),
    ],
)  # fmt: skip
def test_training_that_diverges_stops(where, line, tiny_data, tmp_path, monkeypatch, capsys):
    home = tmp_path / "run"
    with monkeypatch.context() as patch:
        poisoned_steps(patch, **where)
        assert tiny_run.main(*tiny_run.words(tiny_data, home)) == EXIT_DIVERGED
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not (home / "result.json").exists()
    kept = sorted(int(path.name) for path in (home / "checkpoints").iterdir())
    assert kept == ([] if "before" in where and where["before"] == 1 else [6])
    if kept:
        assert tiny_run.digest(home, 6)
        logged = tiny_run.lines(home)
        assert all(np.isfinite(v) for each in logged for k, v in each.items() if k != "stage")
