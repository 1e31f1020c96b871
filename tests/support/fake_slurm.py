"""Stands in for `sbatch` and `squeue`: array tasks are processes of this machine.

`install(directory)` writes the commands. A task is a file DIRECTORY/jobs/JOB_INDEX with its process
id and the name of its job; `squeue` lists those that live. With a file DIRECTORY/dead all fail, as
without a controller.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

COMMAND = """#!{python}
import sys
sys.path.insert(0, {here!r})
import fake_slurm
sys.exit(fake_slurm.{name}(sys.argv[1:], {directory!r}))
"""


def install(directory: Path) -> None:
    """Writes the commands into DIRECTORY/bin."""
    (directory / "bin").mkdir(parents=True)
    (directory / "jobs").mkdir()
    for name in ("sbatch", "squeue"):
        path = directory / "bin" / name
        path.write_text(
            COMMAND.format(python=sys.executable, here=str(Path(__file__).parent), name=name,
                           directory=str(directory))
        )  # fmt: skip
        path.chmod(0o755)


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
