"""pinnace/process/exit.py: the process ends with its grace period, whatever its event loop does."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = """
import threading
from pinnace.errors import ShutdownTimeout
from pinnace.process.exit import StopDeadline

deadline = StopDeadline({grace_period_seconds}, lambda: {error})
deadline.start()
{after}
threading.Event().wait()
"""


@pytest.mark.parametrize(("error", "code"), [("None", 0), ("ShutdownTimeout('the line')", 8)])
@pytest.mark.parametrize(("grace_period_seconds", "after"), [(0.1, ""), (600, "deadline.force()")])
def test_a_process_whose_main_thread_is_blocked_ends_with_its_grace_period(
    error: str, code: int, grace_period_seconds: float, after: str
) -> None:
    program = BLOCKED.format(grace_period_seconds=grace_period_seconds, error=error, after=after)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == code
    assert ("pinnace: the line\n" in done.stderr) == (code == 8)
