import dataclasses
import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from afa import io
from afa.train import logging as writers


def events(folder: Path):
    """The events of every file in `folder`, read as TFRecords: length, crc, bytes, crc."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16


def test_lines_are_json_and_are_read_back(tmp_path):
    with writers.MetricWriter(tmp_path, 0) as log:
        log.log(1, "features", {"loss": jnp.float32(0.5), "gap": float("nan")})
        log.log(2, "features", {"loss": np.float32("inf"), "gap": -math.inf})

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [1, 2]
    first, second = writers.read_history(tmp_path)
    assert first["stage"] == "features" and first["loss"] == 0.5 and math.isnan(first["gap"])
    assert second["loss"] == math.inf and second["gap"] == -math.inf


def test_resume_drops_later_steps(tmp_path):
    with writers.MetricWriter(tmp_path, 0) as log:
        for step in (1, 2, 3, 4):
            log.log(step, "s", {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')  # the process was killed here
    with writers.MetricWriter(tmp_path, 2) as log:
        log.log(3, "s", {"loss": 30})

    assert [(h["step"], h["loss"]) for h in writers.read_history(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_an_incomplete_last_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 12}')
    assert [h["step"] for h in writers.read_history(tmp_path)] == [1]
    with writers.MetricWriter(tmp_path, 5) as log:
        log.log(6, "s", {"loss": 6})
    assert [h["step"] for h in writers.read_history(tmp_path)] == [1, 6]


def test_a_new_start_drops_all_lines(tmp_path):
    for _ in range(2):
        with writers.MetricWriter(tmp_path, 0) as log:
            log.log(0, "s", {"loss": 1})
    assert len(writers.read_history(tmp_path)) == 1


def test_a_metric_with_a_reserved_key_is_an_error(tmp_path):
    with writers.MetricWriter(tmp_path, 0) as log, pytest.raises(ValueError, match="'step'"):
        log.log(1, "s", {"step": 1})


def test_history_of_a_run_that_logged_nothing(tmp_path):
    assert writers.read_history(tmp_path) == []


def test_tensorboard_gets_the_scalars_and_the_purge(tmp_path):
    for resume in (0, 2):
        with writers.MetricWriter(tmp_path, resume) as log:
            log.log(resume + 1, "s", {"loss/d": 0.25})
            log.flush()
    found = list(events(tmp_path / "tensorboard"))
    scalars = {e.step: v.simple_value for e in found for v in e.summary.value if v.tag == "loss/d"}
    assert scalars == {1: 0.25, 3: 0.25}
    assert 3 in [e.step for e in found if e.HasField("session_log")]


@dataclasses.dataclass(frozen=True)
class Config:
    path: Path
    rates: tuple[float, ...]


def test_write_json_writes_all_types_of_a_result(tmp_path):
    config = Config(Path("a/b"), (0.5, math.nan))
    io.write_json(
        tmp_path / "x.json",
        {"config": config, 4: np.arange(2), "r": jnp.float32(0.5), "n": None, "b": np.bool_(True)},
    )
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "config": {"path": "a/b", "rates": [0.5, "NaN"]},
        "4": [0, 1],
        "r": 0.5,
        "n": None,
        "b": True,
    }


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    io.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="object"):
        io.write_json(path, {"a": object()})

    def disk_full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        io.write_atomically(path, disk_full)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_write_result_also_writes_the_queries(tmp_path):
    per_query = {"id": ["q0", "q1"], "correct": np.array([True, False]), "top": np.eye(2)}
    writers.write_result(tmp_path, {"metrics": {"recall_at_1": 0.5}}, per_query)
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["recall_at_1"] == 0.5
    rows = pyarrow.parquet.read_table(tmp_path / "per_query.parquet").to_pydict()
    assert rows == {"id": ["q0", "q1"], "correct": [True, False], "top": [[1.0, 0.0], [0.0, 1.0]]}
    with pytest.raises(ValueError, match="length"):
        writers.write_result(tmp_path / "b", {}, {"a": [1], "b": [1, 2]})
    assert not (tmp_path / "b" / "result.json").exists()
