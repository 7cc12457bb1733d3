"""Closed-loop load: as many connections as are asked for, each sends its next request when it has its answer."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from bench.payloads import Payload

METHOD = "/inference.GRPCInferenceService/ModelInfer"
SCRIPT = """
wrk.method = "POST"
wrk.path = "{path}"
{headers}
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
file:close()
done = function(summary, latency)
  io.write(string.format("RESULT %d %d %d %f %f\\n", summary.requests, summary.duration, summary.errors.status
    + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Result:
    """What the clients saw; `failed` are answers other than 200 or OK, and none at all."""

    per_second: float
    p50_ms: float
    p99_ms: float
    requests: int
    failed: int


def send(url: str, grpc_address: str, payload: Payload, connections: int, seconds: float) -> Result:
    """Over HTTP or gRPC, as the payload asks."""
    if payload.path:
        return wrk(url, payload, connections, seconds)
    return grpc_calls(grpc_address, payload, connections, seconds)


def wrk(url: str, payload: Payload, connections: int, seconds: float) -> Result:
    """HTTP/1.1, by wrk. Raises SystemExit where that is not installed."""
    if not shutil.which("wrk"):
        raise SystemExit("bench: wrk is not installed: `apt-get install wrk`")
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder) / "body", Path(folder) / "script.lua"
        body.write_bytes(payload.body)
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in payload.headers.items())
        script.write_text(SCRIPT.format(path=payload.path, headers=headers, body=body))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", "30s", "-s", str(script), url]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"RESULT (\d+) (\d+) (\d+) ([\d.]+) ([\d.]+)", done.stdout)
    if not found:
        raise SystemExit(f"bench: wrk said {done.stdout} {done.stderr}")
    requests, microseconds, failed, p50, p99 = map(float, found.groups())
    return Result(requests / microseconds * 1e6, p50 / 1e3, p99 / 1e3, int(requests), int(failed))


def grpc_calls(address: str, payload: Payload, connections: int, seconds: float) -> Result:
    """By grpcio, in a process of its own: `python -m bench.load ADDRESS CONNECTIONS SECONDS < message`."""
    command = [sys.executable, "-m", "bench.load", address, str(connections), str(seconds)]
    done = subprocess.run(command, input=payload.body, capture_output=True, check=True)
    return Result(**json.loads(done.stdout))


async def _call(address: str, message: bytes, connections: int, seconds: float) -> Result:
    times: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds

    async def caller(channel: grpc.aio.Channel) -> None:
        nonlocal failed
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        while (started_at := time.perf_counter()) < end:
            try:
                await method(message, timeout=30)
            except grpc.aio.AioRpcError:
                failed += 1
            times.append(time.perf_counter() - started_at)

    # A local pool of subchannels each: else all would share one connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(connections)]
    started_at = time.perf_counter()
    await asyncio.gather(*map(caller, channels))
    took_seconds = time.perf_counter() - started_at
    for channel in channels:
        await channel.close()
    times.sort()
    at = [times[int(len(times) * share)] * 1e3 for share in (0.5, 0.99)]
    return Result(len(times) / took_seconds, at[0], at[1], len(times), failed)


if __name__ == "__main__":
    result = asyncio.run(_call(sys.argv[1], sys.stdin.buffer.read(), int(sys.argv[2]), float(sys.argv[3])))
    sys.stdout.write(json.dumps(result.__dict__) + "\n")
