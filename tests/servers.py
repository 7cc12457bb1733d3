"""The real server as a process of its own, on free ports, for as long as a `with` lasts."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

import httpx

PROJECT = Path(__file__).parent.parent
START_SECONDS = 60
STOP_SECONDS = 60
SETTLE_SECONDS = 20

READY = re.compile(r"ready after [\d.]+ s: .* HTTP port (?P<http>\d+), (gRPC port (?P<grpc>\d+)|no gRPC)")


class Server:
    """What a test may do with a running server; `log` is what it has written to standard error so far."""

    def __init__(self, process: subprocess.Popen[str], stderr: IO[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(stderr,), daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        ready = self.wait_for_line(READY)
        self.http_port, self.grpc_port = int(ready["http"]), int(ready["grpc"] or 0)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_address = f"127.0.0.1:{self.grpc_port}"

    def wait_for_line(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """The next log line that matches; fails where the process ends or is silent before it."""
        while (line := self._lines.get(timeout=START_SECONDS)) is not None:
            self.log.append(line)
            if match := pattern.search(line):
                return match
        raise AssertionError(f"the server ended, exit {self.process.wait()}:\n{''.join(self.log)}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and wait for the exit code; `log` is complete then."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(timeout=STOP_SECONDS)
        while (line := self._lines.get(timeout=STOP_SECONDS)) is not None:
            self.log.append(line)
        return code

    def end(self) -> None:
        """At the latest now; its standard error is read to the end, before it may be closed."""
        self.process.kill()
        self._reader.join(STOP_SECONDS)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def post(self, path: str, content: bytes | str, **headers: str) -> httpx.Response:
        """Header names are written with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.url + path, content=content, headers=named, timeout=60)

    def predict(self, content: bytes | str, **headers: str) -> httpx.Response:
        return self.post("/v1/models/custom-model:predict", content, **headers)

    def connect(self) -> socket.socket:
        """A bare connection to the HTTP port."""
        return socket.create_connection(("127.0.0.1", self.http_port), timeout=30)

    def descriptors(self) -> int:
        """Open files and connections of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait_for_descriptors(self, most: int) -> None:
        """Keep it busy, over one connection more, until it has closed what its clients have closed."""
        deadline = time.monotonic() + SETTLE_SECONDS
        with httpx.Client() as client:
            while (now := self.descriptors()) > most + 1:
                assert time.monotonic() < deadline, f"{now} descriptors are open, {most} were"
                client.get(self.url)

    def _read(self, stderr: IO[str]) -> None:
        for line in stderr:
            self._lines.put(line)
        self._lines.put(None)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while not condition():
        assert time.monotonic() < deadline


def is_alive(process_id: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """What the server sends, up to and with `end`."""
    received = b""
    while not received.endswith(end):
        chunk = connection.recv(65536)
        assert chunk, f"the server closed the connection after {received!r}"
        received += chunk
    return received


@contextmanager
def running(
    *flags: str,
    python_flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    stdout: IO[str] | int = subprocess.DEVNULL,
) -> Iterator[Server]:
    """`app.py` with these flags, on loopback and free ports unless the flags say otherwise."""
    command = [sys.executable, *python_flags, "app.py", "--host=127.0.0.1", "--http_port=0", "--grpc_port=0", *flags]
    with subprocess.Popen(
        command, cwd=PROJECT, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr
        server = Server(process, process.stderr)
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.end()


def gated(tmp_path: Path, *flags: str, predictor: str = "Gated") -> AbstractContextManager[Server]:
    """A server whose requests wait at FIFOs in `tmp_path`, which the fixture `gate` makes."""
    return running(
        f"--predictor=tests.predictors:{predictor}", f"--model_dir={tmp_path}", "--max_asyncio_workers=4", *flags
    )


def start_failing(*flags: str, environment: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """Exit code and lines of standard error of a server that must not start."""
    command = [sys.executable, "app.py", "--host=127.0.0.1", *flags]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, env=environment, timeout=START_SECONDS, check=False
    )
    return done.returncode, done.stderr.splitlines()
