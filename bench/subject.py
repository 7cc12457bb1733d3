"""The server that is measured, and what the kernel says of its processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS, POLL_SECONDS = 120.0, 0.01
QUIET_SECONDS, QUIET_SHARE = 0.4, 0.1
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ServerProcess:
    """A running server; `ready_seconds` are from its exec to its first answer."""

    process_id: int
    url: str
    grpc_address: str
    ready_seconds: float

    @property
    def process_ids(self) -> list[int]:
        """Its own, and those of its workers and their children."""
        found, new = [], [self.process_id]
        while new:
            found += new
            new = [child for one in new for child in children(one)]
        return found

    def cpu_seconds(self) -> float:
        return sum(_cpu_seconds(one) for one in self.process_ids)

    def settle(self) -> None:
        """Wait until it works no more: on what clients asked who have left, it may go on for a while."""
        before = -1.0
        while (now := self.cpu_seconds()) - before > QUIET_SHARE * QUIET_SECONDS:
            before = now
            time.sleep(QUIET_SECONDS)

    def memory_mib(self, kind: str) -> float:
        """`Rss`, or `Pss`, in which pages that processes share count once."""
        return sum(memory_mib(one, kind) for one in self.process_ids)

    def descriptors(self) -> int:
        """Open files and connections."""
        return sum(len(os.listdir(f"/proc/{one}/fd")) for one in self.process_ids)


def children(process_id: int) -> list[int]:
    files = Path(f"/proc/{process_id}/task").glob("*/children")
    return [int(one) for file in files for one in file.read_text().split()]


def _cpu_seconds(process_id: int) -> float:
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # it has ended: the count goes on without
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_mib(process_id: int, kind: str) -> float:
    """Of one process; `kind` as /proc/PID/smaps_rollup names it. Raises ValueError where it does not."""
    counts = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path(f"/proc/{process_id}/smaps_rollup").read_text(), re.M))
    if kind not in counts:
        raise ValueError(f"the kernel does not count {kind}")
    return int(counts[kind]) / 1024


@contextmanager
def started(command: Sequence[str], url: str, grpc_address: str = "") -> Iterator[ServerProcess]:
    """Any server, once it answers `url`; stopped at the end. Raises SystemExit where it does not start."""
    started_at = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not _answers(url):
                if process.poll() is not None or time.perf_counter() > started_at + START_SECONDS:
                    raise SystemExit(f"bench: {' '.join(command)} does not answer {url}")
                time.sleep(POLL_SECONDS)
            yield ServerProcess(process.pid, url, grpc_address, time.perf_counter() - started_at)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


@contextmanager
def serving(model_dir: Path, *flags: str) -> Iterator[ServerProcess]:
    """This server, on free ports."""
    http_port, grpc_port = _free_port(), _free_port()
    places = [f"--model_dir={model_dir}", "--host=127.0.0.1", f"--http_port={http_port}", f"--grpc_port={grpc_port}"]
    command = [sys.executable, "app.py", *places, *flags]
    with started(command, f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}") as subject:
        yield subject


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code < 500
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
