"""pinnace/observability/log_writer.py in a server: whoever reads its logs can neither stop nor delay it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pinnace.observability.log_writer import MAX_QUEUED_CHARACTERS
from tests.support.servers import PROJECT, TWO_WORKERS, Server, run_server
from tests.support.waiting import wait_for

ECHO = "--predictor=tests.support.predictors:Echo"
BODY = '{"instances": [1]}'
LONG_PATH = "/" + "x" * 12_000
PIPE_BYTES = 65536


@pytest.fixture
def unread_pipe() -> Iterator[int]:
    """Open a pipe that nobody reads, and return its end for writing."""
    reading, writing = os.pipe()
    yield writing
    os.close(reading)
    os.close(writing)


def fill_with_log_lines(url: str, workers: int = 1) -> None:
    """Send requests whose log lines fill a pipe and the queue behind it, for each worker."""
    with httpx.Client(timeout=30) as client:
        for _ in range(workers * 2 * (MAX_QUEUED_CHARACTERS + PIPE_BYTES) // len(LONG_PATH)):
            assert client.get(url + LONG_PATH, headers={"Connection": "close"}).status_code == 404


@pytest.mark.parametrize("workers", [1, 2])
def test_a_standard_output_that_nobody_reads_stops_neither_requests_nor_the_stop(
    workers: int, unread_pipe: int
) -> None:
    with run_server(ECHO, f"--workers={workers}", stdout=unread_pipe) as server:
        fill_with_log_lines(server.url, workers)
        assert server.get("/v2/health/ready").status_code == 200
        assert server.predict(BODY).status_code == 200
        assert server.stop() == 0

    assert [line for line in server.log if "log lines were dropped since the start: standard output is not" in line]


def test_a_server_stops_although_nobody_reads_any_of_its_output(unread_pipe: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "app.py", ECHO, "--host=127.0.0.1", f"--http_port={port}", "--grpc_port=0"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=unread_pipe, stderr=unread_pipe) as process:
        try:
            wait_for(lambda: answers(url), "a server that is ready")
            fill_with_log_lines(url)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def test_a_server_outlives_the_reader_of_its_standard_output() -> None:
    reading, writing = os.pipe()
    with run_server(ECHO, stdout=writing) as server:
        os.close(writing)
        os.close(reading)
        for _ in range(3):
            assert server.predict(BODY).status_code == 200
        assert server.stop() == 0

    assert [line for line in server.log if "standard output cannot be written (Broken pipe)" in line]
    assert not [line for line in server.log if "Traceback" in line or "Logging error" in line]


def test_a_server_outlives_a_full_disk_under_its_log() -> None:
    with Path("/dev/full").open("w") as full, run_server(ECHO, stdout=full) as server:
        for _ in range(3):
            assert server.predict(BODY).status_code == 200
        assert server.stop() == 0

    assert [line for line in server.log if "standard output cannot be written (No space left on device)" in line]
    assert not [line for line in server.log if "Traceback" in line or "Logging error" in line]


@pytest.mark.parametrize("flags", [[], [TWO_WORKERS]])
def test_a_standard_output_that_is_closed_is_no_descriptor_for_a_connection(flags: list[str]) -> None:
    command = f'exec {sys.executable} app.py {ECHO} --host=127.0.0.1 --http_port=0 --grpc_port=0 "$@" >&- <&-'
    with subprocess.Popen(
        ["/bin/sh", "-c", command, "sh", *flags], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        server = Server(process, process.stderr)
        try:
            server.wait_until_ready()
            for number in (0, 1):
                assert os.readlink(f"/proc/{process.pid}/fd/{number}") == "/dev/null"
            assert server.predict(BODY).status_code == 200
            assert server.stop() == 0
        finally:
            server.kill()
