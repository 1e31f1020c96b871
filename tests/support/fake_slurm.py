"""Stands in for `sbatch`, `squeue` and `scancel`: array tasks are processes of this machine.

Installed by `fake_commands.install`. A task is a file DIRECTORY/jobs/JOB_INDEX with its process
id and the name of its job; `squeue` lists those that live. With a file DIRECTORY/dead all fail, as
without a controller.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path


def _dead(home: Path) -> bool:
    if (home / "dead").exists():
        print("slurm_load_jobs error: Unable to contact slurm controller", file=sys.stderr)
        return True
    return False


def sbatch(words: list[str], directory: str) -> int:
    """Starts the tasks of an array and prints the number of the job."""
    home = Path(directory)
    if _dead(home):
        return 1
    # Without them SLURM neither starts preempted tasks again nor warns the script.
    assert {"--requeue", "--signal=B:TERM@120"} <= set(words)
    last = next(int(m[1]) for word in words if (m := re.fullmatch(r"--array=0-(\d+)", word)))
    name = next(word.partition("=")[2] for word in words if word.startswith("--job-name="))
    number = 100 + len(list((home / "jobs").iterdir()))
    for index in range(last + 1):
        process = subprocess.Popen(
            ["bash", words[-1]], env=os.environ | {"SLURM_ARRAY_TASK_ID": str(index)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        (home / "jobs" / f"{number}_{index}").write_text(f"{process.pid} {name}")
    print(number)
    return 0


def squeue(words: list[str], directory: str) -> int:
    """Prints the tasks that have not ended."""
    home = Path(directory)
    if _dead(home):
        return 1
    wanted = next((word.partition("=")[2] for word in words if word.startswith("--name=")), "")
    by_job = "--format=%A" in words
    for path in (home / "jobs").iterdir():
        pid, name = path.read_text().split()
        status = Path("/proc") / pid / "stat"
        alive = status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
        if alive and wanted in ("", name):
            print(path.name.partition("_")[0] if by_job else path.name)
    return 0


def scancel(words: list[str], directory: str) -> int:
    """Sends SIGTERM to the script of a task, as `--signal=TERM --batch` does."""
    home = Path(directory)
    if _dead(home):
        return 1
    assert words[:2] == ["--signal=TERM", "--batch"]
    os.kill(int((home / "jobs" / words[2]).read_text().split()[0]), signal.SIGTERM)
    return 0
