"""Overload test: twice as many requests as the server can answer, for a minute: `make overload`.

The load is an open loop: requests arrive at random times and do not wait for answers, like those of many independent
clients.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from bench import load
from bench.payloads import Payload, add_request_argument, make_payloads
from bench.server_process import ServerProcess, run_pinnace

PEAK_CONNECTIONS = 16
PEAK_SECONDS = 5
OVERLOAD_FACTOR = 2
PROBE_INTERVAL_SECONDS = 0.1
RECOVERY_SECONDS = 2.0
PROGRESS_INTERVAL_SECONDS = 10.0
READY_REQUEST = b"GET /v2/health/ready HTTP/1.1\r\nHost: bench\r\n\r\n"


@dataclass(frozen=True)
class Response:
    """A response and its latency. `status` is 0 without one; `retry_after_seconds` is 0 without the header."""

    status: int
    seconds: float
    retry_after_seconds: int = 0


@dataclass(frozen=True)
class Overload:
    """The result of an overload test.

    `lone_seconds` are the latencies of a lone request, before the load and RECOVERY_SECONDS after its last request.
    """

    peak_per_second: float
    offered_per_second: float
    seconds: float
    responses: Sequence[Response]
    probes: Sequence[Response]
    lone_seconds: tuple[float, float]


class ConnectionPool:
    """HTTP/1.1 connections: as many as there are requests in flight, reused once their response has come."""

    def __init__(self, url: str) -> None:
        self._address = (urlsplit(url).hostname, urlsplit(url).port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, request: bytes) -> Response:
        """Send a request, and return its response."""
        started_at = time.perf_counter()
        try:
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
            writer.write(request)
            status = int((await reader.readuntil(b"\r\n")).split()[1])
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n") if line)
            await reader.readexactly(int(headers[b"content-length"]))
        except (OSError, asyncio.IncompleteReadError):
            return Response(0, time.perf_counter() - started_at)
        if headers.get(b"connection") == b"close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return Response(status, time.perf_counter() - started_at, int(headers.get(b"retry-after", 0)))

    def close(self) -> None:
        """Close the idle connections."""
        for _, writer in self._idle:
            writer.close()


def main() -> None:
    """Measure the peak, run the overload test and print its summary."""
    arguments = _parse_arguments()
    with run_pinnace(arguments.model) as server:
        payload = make_payloads(arguments.request)[0]
        peak = load.send(server.url, server.grpc_address, payload, PEAK_CONNECTIONS, PEAK_SECONDS).per_second
        sys.stdout.write(f"peak: {peak:.1f} requests per second from {PEAK_CONNECTIONS} clients, closed loop\n")
        overload = asyncio.run(run_overload(server, payload, peak, OVERLOAD_FACTOR * peak, arguments.seconds))
    sys.stdout.write(summarize(overload) + "\n")


async def run_overload(
    server: ServerProcess, payload: Payload, peak: float, offered: float, seconds: float
) -> Overload:
    """Send `offered` requests per second, and probe readiness meanwhile."""
    pool, probe_pool = ConnectionPool(server.url), ConnectionPool(server.url)
    headers = "".join(f"{name}: {value}\r\n" for name, value in payload.headers.items())
    length = f"Content-Length: {len(payload.body)}\r\n\r\n"
    request = f"POST {payload.path} HTTP/1.1\r\nHost: bench\r\n{headers}{length}".encode() + payload.body
    probes: list[Response] = []

    async def probe_repeatedly() -> None:
        while True:
            probes.append(await probe_pool.send(READY_REQUEST))
            await asyncio.sleep(PROBE_INTERVAL_SECONDS)

    before = await pool.send(request)
    probing = asyncio.create_task(probe_repeatedly())
    requests = [asyncio.create_task(pool.send(request)) async for _ in _poisson_arrivals(offered, seconds)]
    probing.cancel()
    await asyncio.wait({probing})
    await asyncio.sleep(RECOVERY_SECONDS)
    after = await pool.send(request)
    responses = await asyncio.gather(*requests)
    pool.close()
    probe_pool.close()
    return Overload(peak, offered, seconds, responses, probes, (before.seconds, after.seconds))


async def _poisson_arrivals(per_second: float, seconds: float) -> AsyncIterator[None]:
    """Yield at the times of a Poisson process. Arrivals that are overdue are yielded without a pause."""
    chance = random.Random(0)  # noqa: S311
    loop = asyncio.get_running_loop()
    started_at = shown_at = loop.time()
    due = started_at
    while due < started_at + seconds:
        await asyncio.sleep(max(0.0, due - loop.time()))
        yield
        due += chance.expovariate(per_second)
        if loop.time() - shown_at > PROGRESS_INTERVAL_SECONDS:
            shown_at = loop.time()
            sys.stderr.write(f"overload: {shown_at - started_at:.0f} of {seconds:.0f} s\n")


def summarize(overload: Overload) -> str:
    """Return the summary that is printed."""
    answered = [response.seconds for response in overload.responses if response.status == 200]
    rejected = [response for response in overload.responses if response.status == 503]
    retry_afters = sorted({response.retry_after_seconds for response in rejected})
    goodput = len(answered) / overload.seconds
    others = len(overload.responses) - len(answered) - len(rejected)
    failed_probes = sum(probe.status != 200 for probe in overload.probes)
    before_ms, after_ms = (1000 * seconds for seconds in overload.lone_seconds)
    return (
        f"{overload.offered_per_second:.0f} requests per second for {overload.seconds:.0f} s: {goodput:.1f} answered "
        f"per second, {goodput / overload.peak_per_second:.2f} of the peak, latency {_percentiles(answered)}\n"
        f"{len(rejected)} rejected with 503, latency {_percentiles([response.seconds for response in rejected])}, "
        f"Retry-After {retry_afters}\n"
        f"{others} with another status or no response\n"
        f"{len(overload.probes)} probes, {failed_probes} failed, latency "
        f"{_percentiles([probe.seconds for probe in overload.probes])}\n"
        f"a lone request took {before_ms:.0f} ms before the load, {after_ms:.0f} ms {RECOVERY_SECONDS:.0f} s after it"
    )


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "not measured"
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, at most {max(seconds) * 1000:.1f} ms"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overload", description="Send twice as many requests as the server can answer."
    )
    parser.add_argument(
        "--model", type=Path, default=Path("model"), help="directory of an exported model (default model)"
    )
    add_request_argument(parser)
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the overload in seconds (default 60)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
