"""The real server in a process of its own, on free ports, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

import httpx

from tests.support.waiting import wait_for

PROJECT = Path(__file__).parents[2]
START_SECONDS = 60
STOP_SECONDS = 60

READY = re.compile(r"ready after [\d.]+ s: .* HTTP port (?P<http>\d+), (gRPC port (?P<grpc>\d+)|no gRPC)")
STOPPING = re.compile(r"stopping: (\d+) requests in flight")
TWO_WORKERS = "--workers=2"


class Server:
    """A server process. `log` has the lines of standard error up to the last `wait_for_line`, all after `stop`."""

    def __init__(self, process: subprocess.Popen[str], stderr: IO[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(stderr,), daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Wait for the log line that names the ports, and set `http_port`, `grpc_port`, `url` and `grpc_address`."""
        ready = self.wait_for_line(READY)
        self.http_port, self.grpc_port = int(ready["http"]), int(ready["grpc"] or 0)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_address = f"127.0.0.1:{self.grpc_port}"

    def wait_for_line(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Return the match of the next log line that matches. Fails if the process ends or stays silent before it."""
        while (line := self._lines.get(timeout=START_SECONDS)) is not None:
            self.log.append(line)
            if match := pattern.search(line):
                return match
        raise AssertionError(f"the server ended, exit {self.process.wait()}:\n{''.join(self.log)}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and return the exit code. `log` is complete then."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code. `log` is complete then."""
        code = self.process.wait(timeout=STOP_SECONDS)
        while (line := self._lines.get(timeout=STOP_SECONDS)) is not None:
            self.log.append(line)
        return code

    def kill(self) -> None:
        """Kill the process, and read its standard error to the end, so that it may be closed."""
        self.process.kill()
        self._reader.join(STOP_SECONDS)

    def get(self, path: str) -> httpx.Response:
        """Send a GET request."""
        return httpx.get(self.url + path, timeout=30)

    def post(self, path: str, content: bytes | str, **headers: str) -> httpx.Response:
        """Send a POST request. Header names are written with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.url + path, content=content, headers=named, timeout=60)

    def predict(self, content: bytes | str, **headers: str) -> httpx.Response:
        """Send a V1 request to the model custom-model."""
        return self.post("/v1/models/custom-model:predict", content, **headers)

    def connect(self) -> socket.socket:
        """Open a bare connection to the HTTP port."""
        return socket.create_connection(("127.0.0.1", self.http_port), timeout=30)

    def count_descriptors(self) -> int:
        """Return the number of open files and connections of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait_for_descriptors(self, expected: int) -> None:
        """Wait until at most `expected` descriptors are open, and send requests meanwhile.

        The requests keep the event loop running, which closes what clients have closed. Their own connection is one
        more descriptor.
        """
        with httpx.Client() as client:

            def has_closed_connections() -> bool:
                if self.count_descriptors() <= expected + 1:
                    return True
                client.get(self.url)
                return False

            wait_for(has_closed_connections, f"at most {expected} open descriptors")

    def _read(self, stderr: IO[str]) -> None:
        for line in stderr:
            self._lines.put(line)
        self._lines.put(None)


@contextmanager
def run_server(
    *flags: str,
    python_flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    stdout: IO[str] | int = subprocess.DEVNULL,
) -> Iterator[Server]:
    """Run `app.py` with these flags, by default on loopback and free ports, and yield it when it is ready."""
    command = [sys.executable, *python_flags, "app.py", "--host=127.0.0.1", "--http_port=0", "--grpc_port=0", *flags]
    with run_command(command, environment, stdout=stdout) as server:
        yield server


@contextmanager
def run_command(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    directory: Path = PROJECT,
    stdout: IO[str] | int = subprocess.DEVNULL,
) -> Iterator[Server]:
    """Run a command that starts a server, and yield the server when it is ready. Kill it at the end."""
    with subprocess.Popen(
        command, cwd=directory, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr
        server = Server(process, process.stderr)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.kill()


def run_gated_server(tmp_path: Path, *flags: str, predictor: str = "Gated") -> AbstractContextManager[Server]:
    """Run a server whose requests wait at a gate: a FIFO in `tmp_path` that the fixture `make_gate` has made.

    The instance of a request is the name of its gate. Opening the gate for writing blocks until the request has reached
    it; closing the gate lets the request continue.
    """
    return run_server(
        f"--predictor=tests.support.predictors:{predictor}",
        f"--model_dir={tmp_path}",
        "--max_asyncio_workers=4",
        *flags,
    )


def expect_start_failure(*flags: str, environment: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """Run `app.py` until it ends by itself, and return its exit code and the lines of its standard error."""
    command = [sys.executable, "app.py", "--host=127.0.0.1", *flags]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, env=environment, timeout=START_SECONDS, check=False
    )
    return done.returncode, done.stderr.splitlines()


def is_alive(process_id: int) -> bool:
    """Return whether the process exists and is no zombie."""
    try:
        return " Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False


def refuses_connections(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether nothing listens on the port of the host.

    While a listener closes, the kernel may accept a connection and reset it: that port does not refuse yet.
    """
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionError as error:
        return isinstance(error, ConnectionRefusedError)
    return False


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Return what the server sends, up to and including `end`."""
    received = b""
    while not received.endswith(end):
        chunk = connection.recv(65536)
        assert chunk, f"the server closed the connection after {received!r}"
        received += chunk
    return received
