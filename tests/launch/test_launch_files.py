"""The files of launch/: scripts, job descriptions, and what they would run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from paths import ROOT

from experiments import run

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def jobsets():
    return list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text("utf-8")))


@pytest.mark.parametrize("number", [0, 1])
def test_jobs_of_job_sets_are_valid(number):
    """The job of a JobSet is an ordinary Job, which has a published schema; JobSet's own has none
    in a package, so that its few fields are compared with its documentation."""
    jobset = jobsets()[number]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) <= {"failurePolicy", "network", "replicatedJobs"}
    (job,) = jobset["spec"]["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"}
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
    kubernetes_validate.validate(whole, "1.33", strict=True)
    whole["spec"]["paralelism"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(whole, "1.33", strict=True)


def test_job_sets_start_runs():
    tpu, gpu = jobsets()
    for jobset, processes in ((tpu, (1, 0)), (gpu, (2, 1))):
        (job,) = jobset["spec"]["replicatedJobs"]
        pod = job["template"]["spec"]["template"]["spec"]
        words = pod["containers"][0]["args"]
        command = run.parse([word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in words])
        assert command.exp == "afa_resnet50"
        assert command.workdir.startswith(pod["containers"][0]["volumeMounts"][0]["mountPath"])
        assert (command.launch.processes, command.launch.index) == processes


def test_the_task_of_skypilot(tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text("utf-8"))
    command = shlex.split(task["envs"]["AFA_COMMAND"])
    assert command[:3] == ["python", "-m", "experiments.run"]
    assert run.parse(command[3:]).workdir == "/runs/afa_resnet50"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    # The script of a second node of two, with `bash -c` replaced by `echo`.
    script = (
        task["run"]
        .replace("source .venv/bin/activate\n", "")
        .replace('exec bash -c "exec ${AFA_COMMAND}"', "echo ${AFA_COMMAND}")
    )
    variables = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
                 "SKYPILOT_NODE_RANK": "1", "AFA_COMMAND": "python"}  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.stdout == (
        "python --launch.coordinator=10.0.0.1:8482 --launch.processes=2 --launch.index=1\n"
    )


def tpu_vm(*words):
    return subprocess.run(
        ["bash", str(LAUNCH / "tpu_vm.sh"), *words], capture_output=True, text=True, cwd=ROOT
    )


def test_tpu_vm_prints_what_it_would_do():
    done = tpu_vm(
        "create", "mine", "--zone=us-west4-a", "--type=v5litepod-8", "--spot", "--dry_run"
    )
    assert done.stdout.split() == [
        "gcloud", "compute", "tpus", "tpu-vm", "create", "mine", "--accelerator-type=v5litepod-8",
        "--version=v2-alpha-tpuv5-lite", "--spot", "--zone=us-west4-a",
    ]  # fmt: skip
    done = tpu_vm(
        "run", "mine", "--zone=z", "--disk=/mnt/x", "--dry_run", "--", "--exp=afa_resnet50"
    )
    last = shlex.split(done.stdout.splitlines()[-1])
    (remote,) = [word.partition("=")[2] for word in last if word.startswith("--command=")]
    started = shlex.split(remote[remote.index("nohup") :])[3]
    words = shlex.split(started[: started.index(">")])
    assert words[:3] == [".venv/bin/python", "-m", "experiments.run"]
    command = run.parse(words[3:])
    assert command.exp == "afa_resnet50" and command.launch.coordinator == "environment"
    assert command.workdir == "/mnt/x/run"
    assert tpu_vm("delete", "mine", "--zone=z", "--dry_run").stdout.split()[-2:] == [
        "--quiet", "--zone=z",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "mine"], "--zone is missing, such as --zone=us-west4-a"),
        (["create", "mine", "--zone=z", "--dry_run"], "--type is missing"),
        (["run", "mine", "--zone=z", "--dry_run"], "the command of the run is missing"),
        (["make", "mine", "--zone=z", "--dry_run"], "'make' is unknown (allowed: create, run,"),
        (["run", "mine", "--zon=z"], "--zon=z is not an option (allowed: --zone,"),
        ([], "launch/tpu_vm.sh ACTION NAME"),
    ],
)
def test_mistakes_with_tpu_vm(words, said):
    done = tpu_vm(*words)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def slurm(tmp_path):
    """Directory of a SLURM whose `srun` runs a command here, and whose `scontrol` is noted."""
    for name, text in {
        "srun": 'shift\nexec "$@"\n', "scontrol": f'echo "$@" >> {tmp_path}/requeued\n',
    }.items():  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def job(slurm, text):
    """A job of `slurm.sbatch` whose command is a Python program."""
    python = slurm / "python"
    python.write_text(f"#!{sys.executable}\nimport json, signal, sys, time\n{text}")
    python.chmod(0o755)
    variables = {"PATH": f"{slurm}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                 "AFA_PYTHON": str(python)}  # fmt: skip
    return subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sbatch"), "--exp=debug"], env=os.environ | variables,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_job_of_slurm_runs_the_command(slurm):
    process = job(slurm, "print(json.dumps(sys.argv[1:]))")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out) == ["-m", "experiments.run", "--exp=debug"]
    assert not (slurm / "requeued").exists()


def test_a_failed_job_is_not_queued_again(slurm):
    process = job(slurm, "sys.exit(2)")
    process.communicate(timeout=60)
    assert process.returncode == 2 and not (slurm / "requeued").exists()


def test_a_preempted_job_saves_and_is_queued_again(slurm):
    """SLURM sends SIGTERM to the script, which has to pass it on."""
    process = job(slurm, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
                         "print('begun', flush=True)\ntime.sleep(60)")  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 0
    assert (slurm / "requeued").read_text() == "requeue 7\n"


def test_the_image_has_three_targets_and_is_not_root():
    text = (LAUNCH / "Dockerfile").read_text("utf-8")
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    names = [stage.split(" AS ")[1].split()[0] for stage in stages]
    assert names == ["wheels", "cpu", "cuda", "tpu"]
    for stage in stages[1:]:
        assert re.findall(r"^USER (\w+)", stage, re.MULTILINE)[-1] == "afa"
    for copied in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE):
        for name in copied.split():
            assert (ROOT / name).exists(), name
    assert re.search(r'^ENTRYPOINT \["python", "-m", "experiments.run"\]', text, re.MULTILINE)


def test_every_way_is_in_the_list():
    text = (LAUNCH / "README.md").read_text("utf-8")
    for path in LAUNCH.iterdir():
        if path.suffix in (".sh", ".sbatch", ".yaml") or path.name == "Dockerfile":
            assert f"launch/{path.name}" in text, path.name
    done = [LAUNCH / name for name in re.findall(r"launch/([\w.]+)", text) if "." in name]
    assert all(path.exists() for path in done if path.name != "launch.doctor")
