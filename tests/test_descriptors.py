"""The limit on open files: it limits the connections, and a server with too few of them does not start."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack

import pytest

from pinnace.process.descriptors import DESCRIPTORS_PER_WORKER, MIN_DESCRIPTORS
from tests.support.servers import PROJECT, run_command
from tests.support.waiting import wait_for

COMMAND = [
    *(sys.executable, "app.py", "--predictor=tests.support.predictors:Echo", "--host=127.0.0.1"),
    *("--http_port=0", "--grpc_port=0"),
]
LOWERED = re.compile(r"max_connections is (\d+) per port instead of 1000: the limit on open files \(ulimit -n\) is 64")


def test_a_low_limit_on_open_files_lowers_max_connections_and_locks_nobody_out() -> None:
    with run_command(["prlimit", f"--nofile={MIN_DESCRIPTORS}", *COMMAND]) as server, ExitStack() as stack:
        assert [int(match[1]) > 0 for line in server.log if (match := LOWERED.search(line))] == [True]
        for _ in range(2 * MIN_DESCRIPTORS):
            stack.enter_context(server.connect())
        # A connection younger than 0.1 s is not closed for another.
        wait_for(lambda: server.get("/").status_code == 200, "a connection that may be closed")

        assert [server.get("/").status_code for _ in range(20)] == [200] * 20
        assert server.stop() == 0

    assert not [line for line in server.log if re.search("Traceback|system resource", line)]


@pytest.mark.parametrize("limit", [16, 24, MIN_DESCRIPTORS - 1])
@pytest.mark.parametrize("workers", [1, 2])
def test_too_few_open_files_stop_the_start_with_one_line(limit: int, workers: int) -> None:
    command = ["prlimit", f"--nofile={limit}", *COMMAND, f"--workers={workers}"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)

    needed = MIN_DESCRIPTORS + (DESCRIPTORS_PER_WORKER * workers if workers > 1 else 0)
    problem = f"the limit on open files is {limit}, and the server needs {needed}: raise it (ulimit -n, RLIMIT_NOFILE)"
    assert (done.returncode, done.stderr) == (2, f"pinnace: {problem}\n")
