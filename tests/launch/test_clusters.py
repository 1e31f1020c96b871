"""Two processes in faked environments of launchers train, are preempted, continue and agree.

Only the variables of a launcher are set, with localhost for its machines; how the processes find
each other is JAX's own code for that launcher. SIGTERM reaches one process after step 3. Both save
the same step and end with the exit code of a preempted run; started again, they end with the
figures of two processes that were not disturbed.
"""

import json
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import process_worker
import pytest
import tiny_run
import yaml
from paths import ROOT

from afa.errors import EXIT_PREEMPTED

FIRST_PORT = 65535 - 2**12 + 1  # JAX adds a job number to it (SLURM, Open MPI)
STEPS = 40


def free_port(least=1024):
    """A free port of this machine."""
    for port in range(max(least, 20000 + os.getpid() % 10000), 65535):
        with socket.socket() as free:
            try:
                free.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def slurm(index, port):
    return {
        "SLURM_JOB_ID": port - FIRST_PORT, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2,
        "SLURM_PROCID": index, "SLURM_LOCALID": index, "SLURM_STEP_NUM_NODES": 1,
    }, []  # fmt: skip


def open_mpi(index, port):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{port - FIRST_PORT}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": index,
        "OMPI_COMM_WORLD_LOCAL_RANK": index,
    }, []  # fmt: skip


def gke_tpu(index, port):
    """GKE sets the names of all workers of the slice."""
    return {
        "FAKE_TPU_VM": 1, "TPU_SKIP_MDS_QUERY": 1, "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "TPU_WORKER_ID": index, "MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "",
        "MEGASCALE_SLICE_ID": "",
    }, []  # fmt: skip


def tpu_vm(index, port):
    """The workers of a TPU VM ask a metadata server, which `launch/tpu_vm.sh` has JAX do."""
    found = {
        "agent-worker-number": str(index), "worker-network-endpoints": "localhost,localhost",
        "tpu-env": "MEGASCALE_NUM_SLICES: ''\n",
    }  # fmt: skip

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            text = found.get(self.path.rpartition("/")[2])
            self.send_response(200 if text is not None else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = (ROOT / "launch" / "tpu_vm.sh").read_text("utf-8")
    word = re.search(r"--launch\.coordinator=\w+", script)
    assert word
    return {"FAKE_TPU_VM": 1, "GCE_METADATA_IP": f"localhost:{server.server_port}"}, [word[0]]


def gke_gpu(index, port):
    """The words of the command in `launch/jobset.yaml`, with the variables that JobSet sets."""
    documents = yaml.safe_load_all((ROOT / "launch" / "jobset.yaml").read_text("utf-8"))
    pods = [pod_of(document) for document in documents]
    container = next(pod["containers"][0] for pod in pods if "nvidia.com/gpu" in str(pod))
    text = " ".join(container["args"]).replace("$(JOB_COMPLETION_INDEX)", str(index))
    words = re.findall(r"--launch\.\w+=\S+", text)
    assert len(words) == 3
    return {}, [re.sub(r"coordinator=[^:]+:\d+", f"coordinator=localhost:{port}", word)
                for word in words]  # fmt: skip


def pod_of(jobset):
    """The pod of the only job of a JobSet."""
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


LAUNCHERS = {"slurm": slurm, "open_mpi": open_mpi, "gke_tpu": gke_tpu, "tpu_vm": tpu_vm,
             "gke_gpu": gke_gpu}  # fmt: skip


def both(launcher, data, home, **more):
    """Runs two processes of a launcher; returns code, output and errors of each."""
    port = free_port(FIRST_PORT) if launcher in (slurm, open_mpi) else free_port()
    running = []
    for index in range(2):
        variables, words = launcher(index, port)
        environment = {name: str(value) for name, value in variables.items()}
        changes = {"train.steps": str(STEPS), "train.evaluate_every": "100%"}
        line = [*process_worker.words(data, home, **changes), *words]
        extra = {name: value for name, value in more.items() if index == 0 or name == "PAUSE"}
        running.append(tiny_run.start(*line, JAX_PLATFORMS="cpu", XLA_FLAGS="", **environment,
                                      **extra))  # fmt: skip
    try:
        return [tiny_run.finish(each) for each in running]
    finally:
        for each in running:
            each.kill()


@pytest.fixture(scope="session")
def undisturbed(tiny_data, tmp_path_factory):
    """The figures of two processes that were not disturbed."""
    home = tiny_run.shared(tmp_path_factory) / "two_processes"
    with tiny_run.once(home) as first:
        if first:
            assert [code for code, *_ in both(slurm, tiny_data, home)] == [0, 0]
    return tiny_run.figures(home)


@pytest.mark.parametrize(
    "name", ["slurm", *(pytest.param(each, marks=pytest.mark.slow) for each in LAUNCHERS
                        if each != "slurm")]
)  # fmt: skip
def test_two_processes_are_preempted_and_continue(name, tiny_data, undisturbed, tmp_path):
    home: Path = tmp_path / "run"
    ended = both(LAUNCHERS[name], tiny_data, home, END="step:3:SIGTERM", PAUSE="0.3")
    assert [code for code, *_ in ended] == [EXIT_PREEMPTED] * 2, ended
    steps = {int(path.name) for path in (home / "checkpoints").iterdir() if path.name.isdecimal()}
    assert 3 <= max(steps) < STEPS
    ended = both(LAUNCHERS[name], tiny_data, home)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert f"resuming after step {max(steps)} of {STEPS}" in ended[0][1]
    assert json.loads((home / "result.json").read_text())["hardware"] == "2 x cpu"
    assert tiny_run.figures(home) == undisturbed
