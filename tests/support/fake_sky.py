"""Stands in for SkyPilot's command `sky`: managed jobs are processes of this machine.

Installed by `fake_commands.install`. A job is a file DIRECTORY/jobs/NAME with its process id; its
exit code is in NAME.code. With a file DIRECTORY/dead it fails, as without a server.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def sky(words: list[str], directory: str) -> int:
    """Runs `sky jobs launch`, `queue` or `cancel`."""
    home = Path(directory)
    if (home / "dead").exists():
        print("Could not connect to SkyPilot API server", file=sys.stderr)
        return 1
    assert words[0] == "jobs"
    given = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    if words[1] == "launch":
        assert "--yes" in words and "--detach-run" in words and words[-1].endswith(".yaml")
        command = given["env"].removeprefix("AFA_COMMAND=")
        code = home / f"{given['name']}.code"
        process = subprocess.Popen(
            ["bash", "-c", f'trap "" TERM; ({command}); echo $? > {code}'],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        (home / "jobs" / given["name"]).write_text(str(process.pid))
    elif words[1] == "queue":
        assert "--output=json" in words and "--all" in words
        rows = [{"job_name": path.name, "status": _state(home, path.name)}
                for path in (home / "jobs").iterdir()]  # fmt: skip
        print(json.dumps(rows))
    else:
        os.killpg(int((home / "jobs" / given["name"]).read_text()), signal.SIGTERM)
    return 0


def _state(home: Path, name: str) -> str:
    code = home / f"{name}.code"
    text = code.read_text().strip() if code.exists() else ""
    if text:
        return "SUCCEEDED" if text == "0" else "FAILED"
    return "RUNNING"
