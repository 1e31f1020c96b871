"""Embedded Milvus files: what no other engine has."""

import importlib
import os
import subprocess
import sys

import pytest
from gallery import MANIFEST, records
from paths import ROOT

from afa.errors import UserError
from afa.retrieval import index

pytest.importorskip("milvus_lite")


def test_an_idle_embedded_file_gets_no_pings(tmp_path, monkeypatch):
    """Its server closes the connection of a client that pings, and gRPC prints why."""
    grpc, opened = importlib.import_module("grpc"), []
    connect = grpc.insecure_channel

    def channel(address, options=(), **rest):
        opened.append(dict(options))
        return connect(address, options=options, **rest)

    monkeypatch.setattr(grpc, "insecure_channel", channel)
    index.create(f"milvus://{tmp_path}/idle.db?index=FLAT", records(9), dict(MANIFEST)).close()
    assert opened
    assert all(each["grpc.keepalive_time_ms"] == 2**31 - 1 for each in opened)


@pytest.mark.slow
def test_an_idle_embedded_file_prints_nothing(tmp_path):
    code = """
import sys, time
from gallery import MANIFEST, records
from afa.retrieval import index
made = index.create(sys.argv[1], records(9), dict(MANIFEST))
time.sleep(120)
made.search(records(9).vectors, 1)
made.close()
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-c", code, f"milvus://{tmp_path}/idle.db"],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")


def test_an_embedded_file_that_another_process_has_open(tmp_path):
    path = tmp_path / "vectors.db"
    path.mkdir()
    code = """
import sys
from pathlib import Path
from afa.io import locked
with locked(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path / "LOCK")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError) as error:
            index.create(f"milvus://{path}?index=FLAT", records(9), dict(MANIFEST))
        other.communicate()
    assert str(error.value) == (
        f"milvus://{path}?index=FLAT: another process has this file open, and only one at a "
        "time can: close it there, or use a server (milvus://HOST:PORT)"
    )
    index.create(f"milvus://{path}?index=FLAT", records(9), dict(MANIFEST)).close()
