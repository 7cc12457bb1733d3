"""pinnace/healthcheck.py: what a container's HEALTHCHECK is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pods import Pod, run_pod, skip_without_namespaces


@pytest.fixture(scope="module")
def elsewhere(model_dir: Path) -> Iterator[Pod]:
    """A server whose flags have moved its ports."""
    skip_without_namespaces()
    with run_pod(["--http_port=9000", "--grpc_port=9001"], {"PATH": os.environ["PATH"]}, model_dir) as it:
        yield it


def check(pod: Pod, process_id: int) -> str:
    return pod.run(sys.executable, "-m", "pinnace.process.healthcheck", str(process_id))


def test_a_ready_server_is_healthy_at_the_port_that_its_flags_say(elsewhere: Pod) -> None:
    assert check(elsewhere, elsewhere.server.process.pid) == ""


def test_a_port_that_nobody_answers_is_not_healthy(elsewhere: Pod) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        check(elsewhere, os.getpid())

    assert failed.value.returncode == 1
    assert failed.value.stderr.startswith("port 8080: ")
