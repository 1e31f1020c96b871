"""Waits for other processes, not for ever."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SECONDS = 120


def until(condition: Callable[[], T], seconds: float = SECONDS) -> T:
    """Calls `condition` until it returns something true, and returns that."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"nothing happened within {seconds} s"
        time.sleep(0.05)
    return found
