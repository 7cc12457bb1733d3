"""The server under test, and the kernel's accounts of its processes."""

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

START_TIMEOUT_SECONDS, STOP_TIMEOUT_SECONDS, POLL_SECONDS = 120.0, 60.0, 0.01
IDLE_CHECK_SECONDS, MAX_IDLE_CPU_SHARE = 0.4, 0.1
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ServerProcess:
    """A running server. `ready_seconds` is the time from its exec to its first answer."""

    process_id: int
    url: str
    grpc_address: str
    ready_seconds: float

    @property
    def process_ids(self) -> list[int]:
        """Return the ids of the process and of all its descendants, such as workers."""
        all_ids, generation = [], [self.process_id]
        while generation:
            all_ids += generation
            generation = [child for process_id in generation for child in children(process_id)]
        return all_ids

    def cpu_seconds(self) -> float:
        """Return the CPU time that the processes have used."""
        return sum(_cpu_seconds(process_id) for process_id in self.process_ids)

    def wait_until_idle(self) -> None:
        """Wait until the processes use nearly no CPU: the server may still work on requests whose clients have left."""
        before = -1.0
        while (now := self.cpu_seconds()) - before > MAX_IDLE_CPU_SHARE * IDLE_CHECK_SECONDS:
            before = now
            time.sleep(IDLE_CHECK_SECONDS)

    def memory_mib(self, kind: str) -> float:
        """Return the memory of the processes. `kind` is Rss, or Pss, which divides shared pages among their users."""
        return sum(memory_mib(process_id, kind) for process_id in self.process_ids)

    def count_descriptors(self) -> int:
        """Return the number of open files and connections."""
        return sum(len(os.listdir(f"/proc/{process_id}/fd")) for process_id in self.process_ids)


def children(process_id: int) -> list[int]:
    """Return the ids of a process's children."""
    files = Path(f"/proc/{process_id}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def _cpu_seconds(process_id: int) -> float:
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # the process has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def memory_mib(process_id: int, kind: str) -> float:
    """Return the memory of one process. `kind` is a name in /proc/PID/smaps_rollup, else this raises ValueError."""
    counts = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path(f"/proc/{process_id}/smaps_rollup").read_text(), re.M))
    if kind not in counts:
        raise ValueError(f"the kernel does not count {kind}")
    return int(counts[kind]) / 1024


@contextmanager
def run_server(command: Sequence[str], url: str, grpc_address: str = "") -> Iterator[ServerProcess]:
    """Start a server, yield it once it answers `url`, and stop it. Raises SystemExit if it does not start."""
    started_at = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not _answers(url):
                if process.poll() is not None or time.perf_counter() > started_at + START_TIMEOUT_SECONDS:
                    raise SystemExit(f"bench: {' '.join(command)} does not answer {url}")
                time.sleep(POLL_SECONDS)
            yield ServerProcess(process.pid, url, grpc_address, time.perf_counter() - started_at)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=STOP_TIMEOUT_SECONDS)


@contextmanager
def run_pinnace(model_dir: Path, *flags: str) -> Iterator[ServerProcess]:
    """Start this project's server on free ports, yield it once it answers, and stop it."""
    http_port, grpc_port = _free_port(), _free_port()
    ports = [f"--http_port={http_port}", f"--grpc_port={grpc_port}"]
    command = [sys.executable, "app.py", f"--model_dir={model_dir}", "--host=127.0.0.1", *ports, *flags]
    with run_server(command, f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}") as server:
        yield server


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code < 500
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
