"""Twice as many requests as the server can answer, come what may: `make overload`.

Open loop: they arrive at random times, however long the answers take, as those of many independent clients do.
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
from bench.payloads import Payload, payloads
from bench.subject import ServerProcess, serving

PEAK_CONNECTIONS = 16
PROBE_SECONDS = 0.1
RECOVERY_SECONDS = 2.0
SHOWN_SECONDS = 10.0
READY = b"GET /v2/health/ready HTTP/1.1\r\nHost: bench\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """`status` is 0 where there was none; `retry_after_seconds` is 0 where none was told."""

    status: int
    seconds: float
    retry_after_seconds: int = 0


@dataclass(frozen=True)
class Overload:
    """What became of it all; `lone_seconds` of a request alone, before and RECOVERY_SECONDS after the load."""

    peak_per_second: float
    offered_per_second: float
    seconds: float
    answers: Sequence[Answer]
    probes: Sequence[Answer]
    lone_seconds: tuple[float, float]


class Clients:
    """As many connections as are needed at a time, each used again once its answer has come."""

    def __init__(self, url: str) -> None:
        self._address = (urlsplit(url).hostname, urlsplit(url).port)
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: bytes) -> Answer:
        started_at = time.perf_counter()
        try:
            reader, writer = self._free.pop() if self._free else await asyncio.open_connection(*self._address)
            writer.write(request)
            status = int((await reader.readuntil(b"\r\n")).split()[1])
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n") if line)
            await reader.readexactly(int(headers[b"content-length"]))
        except (OSError, asyncio.IncompleteReadError):
            return Answer(0, time.perf_counter() - started_at)
        if headers.get(b"connection") == b"close":
            writer.close()
        else:
            self._free.append((reader, writer))
        return Answer(status, time.perf_counter() - started_at, int(headers.get(b"retry-after", 0)))

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()


def main() -> None:
    arguments = _arguments()
    with serving(arguments.model) as subject:
        payload = payloads(arguments.request)[0]
        peak = load.send(subject.url, subject.grpc_address, payload, PEAK_CONNECTIONS, 5).per_second
        sys.stdout.write(
            f"peak {peak:.1f} requests a second, of {PEAK_CONNECTIONS} clients that wait for their answers\n"
        )
        overload = asyncio.run(overloaded(subject, payload, peak, 2 * peak, arguments.seconds))
    sys.stdout.write(summary(overload) + "\n")


async def overloaded(subject: ServerProcess, payload: Payload, peak: float, offered: float, seconds: float) -> Overload:
    clients, probing = Clients(subject.url), Clients(subject.url)
    headers = "".join(f"{name}: {value}\r\n" for name, value in payload.headers.items())
    length = f"Content-Length: {len(payload.body)}\r\n\r\n"
    request = f"POST {payload.path} HTTP/1.1\r\nHost: bench\r\n{headers}{length}".encode() + payload.body
    probes: list[Answer] = []

    async def probe() -> None:
        while True:
            probes.append(await probing.ask(READY))
            await asyncio.sleep(PROBE_SECONDS)

    before = await clients.ask(request)
    watching = asyncio.create_task(probe())
    arrivals = [asyncio.create_task(clients.ask(request)) async for _ in _poisson(offered, seconds)]
    watching.cancel()
    await asyncio.wait({watching})
    await asyncio.sleep(RECOVERY_SECONDS)
    after = await clients.ask(request)
    answers = await asyncio.gather(*arrivals)
    for one in (clients, probing):
        one.close()
    return Overload(peak, offered, seconds, answers, probes, (before.seconds, after.seconds))


async def _poisson(per_second: float, seconds: float) -> AsyncIterator[None]:
    """Yields at random times, of which those that are over are made up for at once."""
    chance = random.Random(0)  # noqa: S311
    loop = asyncio.get_running_loop()
    started_at = shown_at = loop.time()
    due = started_at
    while due < started_at + seconds:
        await asyncio.sleep(max(0.0, due - loop.time()))
        yield
        due += chance.expovariate(per_second)
        if loop.time() - shown_at > SHOWN_SECONDS:
            shown_at = loop.time()
            sys.stderr.write(f"overload: {shown_at - started_at:.0f} of {seconds:.0f} s\n")


def summary(overload: Overload) -> str:
    answered = [one.seconds for one in overload.answers if one.status == 200]
    refused = [one for one in overload.answers if one.status == 503]
    told = sorted({one.retry_after_seconds for one in refused})
    goodput = len(answered) / overload.seconds
    others = len(overload.answers) - len(answered) - len(refused)
    probes = [one.seconds for one in overload.probes]
    before, after = (1000 * seconds for seconds in overload.lone_seconds)
    return (
        f"{overload.offered_per_second:.0f} requests a second for {overload.seconds:.0f} s: {goodput:.1f} answered a "
        f"second, {goodput / overload.peak_per_second:.2f} of the peak, in {_spread(answered)}\n"
        f"{len(refused)} refused with 503 in {_spread([one.seconds for one in refused])}, Retry-After {told}\n"
        f"{others} ended otherwise\n"
        f"{len(probes)} probes in {_spread(probes)}, {sum(one.status != 200 for one in overload.probes)} of them "
        f"failed\na lone request took {before:.0f} ms before, {after:.0f} ms {RECOVERY_SECONDS:.0f} s after the last"
    )


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "no time"
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, at most {max(seconds) * 1000:.1f} ms"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("model"))
    parser.add_argument("--request", type=Path, default=Path("examples/input.json"))
    parser.add_argument("--seconds", type=float, default=60.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
