"""pinnace/process/healthcheck.py: what a container's HEALTHCHECK reports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pinnace.process.healthcheck import server_flags
from tests.support.pods import Pod, run_pod, skip_without_namespaces

HEALTHCHECK = (sys.executable, "-m", "pinnace.process.healthcheck")


@pytest.fixture(scope="module")
def elsewhere(model_dir: Path) -> Iterator[Pod]:
    """A server whose flags have moved its ports."""
    skip_without_namespaces()
    with run_pod(["--http_port=9000", "--grpc_port=9001"], {"PATH": os.environ["PATH"]}, model_dir) as it:
        yield it


def check(pod: Pod, process_id: int) -> str:
    return pod.run(*HEALTHCHECK, str(process_id))


def test_a_ready_server_is_healthy_at_the_port_that_its_flags_say(elsewhere: Pod) -> None:
    assert check(elsewhere, elsewhere.server.process.pid) == ""


def test_a_port_that_nobody_answers_is_not_healthy(elsewhere: Pod) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        check(elsewhere, os.getpid())

    assert failed.value.returncode == 1
    assert failed.value.stderr.startswith("pinnace: port 8080: ")


@pytest.mark.parametrize(
    "command",
    [
        "python app.py",
        "/usr/local/bin/python -X dev /app/app.py",
        "/sbin/docker-init -- python app.py",
        "/opt/venv/bin/python3.11 /opt/venv/bin/pinnace serve",
        "python -m pinnace serve",
        "/home/pinnace/bin/python /srv/pinnace/app.py",
    ],
)
def test_the_flags_of_a_server_follow_its_command(command: str) -> None:
    assert server_flags([*command.split(), "--host=a b", "--http_port=9000"]) == ["--host=a b", "--http_port=9000"]


@pytest.mark.parametrize("command", [["bash", "-c", "python app.py --http_port=9000"], ["/home/pinnace", "check"]])
def test_any_other_command_has_no_flags_of_a_server(command: list[str]) -> None:
    assert server_flags(command) == []


def test_a_process_that_is_gone_is_unhealthy_with_one_line() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        ended = subprocess.run([*HEALTHCHECK, str(process.pid)], capture_output=True, text=True, check=False)
    gone = subprocess.run([*HEALTHCHECK, str(process.pid)], capture_output=True, text=True, check=False)

    assert (ended.returncode, ended.stderr) == (1, f"pinnace: process {process.pid} has ended\n")
    assert (gone.returncode, gone.stderr) == (1, f"pinnace: process {process.pid}: No such file or directory\n")
