"""A kill at any moment leaves the old index or the new one."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gallery import MANIFEST, records, vectors
from paths import ROOT, SUPPORT

from afa.retrieval import export, index

KILLED = """
import os, signal, sys, threading, time
from gallery import records
from afa.retrieval import index

task, home, uri, after = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
made = None if task == "build" else index.load(home)
index.create("scann://", records(100))  # so that importing ScaNN does not count
began = time.perf_counter()
if after:
    threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
if task == "build":
    index.build(home, uri)
elif task == "add":
    made.add(records(2000, seed=5, first=4000))
    made.save()
else:
    made.remove(made.records().ids[:50].tolist())
    made.save()
print(time.perf_counter() - began, flush=True)
os._exit(0)
"""


def seconds_of(task, home, uri, after):
    """Runs a task in a process that kills itself after some seconds (0: never); returns the time
    that it took, None if it was killed before its end."""
    path = os.pathsep.join(map(str, (Path(__file__).parent, SUPPORT, ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, task, str(home), uri, str(after)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return float(done.stdout) if done.stdout else None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("scann") is None, reason="scann is not installed")
@pytest.mark.parametrize("task", ["build", "add", "save"])
def test_twenty_kills_leave_the_old_or_the_new_index(tmp_path, task):
    """Kills spread over the time that the task takes, each on a fresh copy of the index."""
    uri, queries = "scann://?leaves=60&searched=60&reorder=400", vectors(5, seed=1)
    original, changed = tmp_path / "original", tmp_path / "changed"
    export.write_export(original, records(4000), MANIFEST)
    if task != "build":
        index.build(original, uri)
    shutil.copytree(original, changed)
    before, seconds = results_of(original, queries), seconds_of(task, changed, uri, 0)
    after = results_of(changed, queries)
    assert seconds is not None and after != before
    ended = []
    for turn in range(20):
        home = shutil.copytree(original, tmp_path / f"turn-{turn}")
        ended.append(seconds_of(task, home, uri, seconds * (turn + 1) / 20) is not None)
        state = results_of(home, queries)
        assert same(state, before) or same(state, after)
        index.build(home, uri)  # it can be built again
        shutil.rmtree(home)
    assert not all(ended)


def same(found, expected):
    """Whether results are equal; engines of the same rows may round differently."""
    if found is None or expected is None:
        return found is expected
    return found[0] == expected[0] and np.allclose(found[1], expected[1], atol=1e-6)


def results_of(home, queries):
    """Returns ids and scores; None for embeddings without an index."""
    if "engine" not in json.loads((home / "index.json").read_text()):
        assert len(export.read_export(home)[0]) == 4000
        return None
    found = index.load(home).search(queries, 20)
    return found.ids.tolist(), found.scores.tolist()
