"""A steady client: it asks for a prediction and a probe once per second, and notes how long each took.

It runs in a process of its own, `python -m tests.support.steady_client URL BODY_FILE`, so that nothing else in the test
delays it. Each request opens a connection, as curl and the probes of Kubernetes do. When its standard input ends, it
finishes what it has begun and prints its records as JSON.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support.clients import PREDICT
from tests.support.servers import PROJECT, Server

PERIOD_SECONDS = 1.0
TIMEOUT_SECONDS = 30.0
PREDICTION_SECONDS = 2.0
PROBE_SECONDS = 0.25
SECONDS_AFTER = 3.0  # how long the client goes on after an attack
READY_PATH = "/v2/health/ready"

Record = tuple[int | str, float]
"""The status of a response, or the name of the exception in its place, and the seconds that it took."""


@contextmanager
def good_service(server: Server, body: bytes, directory: Path) -> Iterator[None]:
    """Require good service for a steady client during the `with` block, and for three seconds after it.

    Raises AssertionError if a prediction or a probe fails, if a prediction takes longer than 2 s, or if a probe takes
    longer than 0.25 s. `body` is a V1 request; a file with it is written to `directory`.
    """
    file = directory / "steady_request"
    file.write_bytes(body)
    command = [sys.executable, "-m", "tests.support.steady_client", server.url, str(file)]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield
            threading.Event().wait(SECONDS_AFTER)
            output, _ = process.communicate(timeout=2 * TIMEOUT_SECONDS)
        finally:
            process.kill()
    for name, bound_seconds in (("predictions", PREDICTION_SECONDS), ("probes", PROBE_SECONDS)):
        records: list[Record] = json.loads(output)[name]
        slowest = max(seconds for _, seconds in records)
        sys.stdout.write(f"\n{len(records)} {name} of the steady client, the slowest took {slowest:.3f} s\n")
        bad = [(status, seconds) for status, seconds in records if status != 200 or seconds > bound_seconds]
        assert not bad, f"{len(bad)} of {len(records)} {name} failed or took longer than {bound_seconds} s: {bad[:10]}"


class _SteadyClient:
    def __init__(self, url: str, body: bytes) -> None:
        self._address = urlsplit(url)
        self._body = body
        self._stop = threading.Event()
        self._records: dict[str, list[Record]] = {"predictions": [], "probes": []}

    def run_until_input_ends(self) -> dict[str, list[Record]]:
        threads = [
            threading.Thread(target=self._repeat, args=("predictions", "POST", PREDICT, self._body)),
            threading.Thread(target=self._repeat, args=("probes", "GET", READY_PATH, None)),
        ]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        self._stop.set()
        for thread in threads:
            thread.join()
        return self._records

    def _repeat(self, name: str, method: str, path: str, body: bytes | None) -> None:
        due_at = time.monotonic()
        while not self._stop.wait(max(0.0, due_at - time.monotonic())):
            due_at = max(due_at + PERIOD_SECONDS, time.monotonic())
            self._records[name].append(self._send(method, path, body))

    def _send(self, method: str, path: str, body: bytes | None) -> Record:
        started_at = time.monotonic()
        status: int | str
        try:
            status = self._status(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
        return status, time.monotonic() - started_at

    def _status(self, method: str, path: str, body: bytes | None) -> int:
        hostname: Any = self._address.hostname
        connection = http.client.HTTPConnection(hostname, self._address.port, timeout=TIMEOUT_SECONDS)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()


if __name__ == "__main__":
    client = _SteadyClient(sys.argv[1], Path(sys.argv[2]).read_bytes())
    json.dump(client.run_until_input_ends(), sys.stdout)
