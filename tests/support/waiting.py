"""Waiting for a condition that another process brings about."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_SECONDS = 0.005


def wait_for(condition: Callable[[], bool], awaited: str, timeout_seconds: float = 20) -> None:
    """Poll `condition` until it is true. Raises AssertionError, which names `awaited`, after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_seconds:g} s in vain for {awaited}")
        time.sleep(POLL_SECONDS)
