"""Runs a command of a cluster; its failures are reported in one line."""

import subprocess

from afa.errors import UserError

SECONDS = 300  # a command that takes longer does not answer


def output(system: str, *words: str) -> str:
    """Returns the standard output of a command.

    Args:
      system: name of the cluster system, for errors.
      words: the command.

    Raises:
      UserError: there is no such command, or it fails or does not answer.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not found: this machine has no {system}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} does not answer; is {system} up?") from None
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{words[0]}: {reason}")
    return done.stdout
