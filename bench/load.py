"""Closed-loop load: each connection sends its next request when it has the answer to the previous one."""

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
TIMEOUT_SECONDS = 30
WRK_SCRIPT = """
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
    """A measurement by the clients. `failed` counts answers other than 200 or OK, and requests without an answer."""

    per_second: float
    p50_ms: float
    p99_ms: float
    requests: int
    failed: int


def send(url: str, grpc_address: str, payload: Payload, connections: int, seconds: float) -> Result:
    """Send the payload over HTTP or gRPC for so many seconds."""
    if payload.path:
        return send_http(url, payload, connections, seconds)
    return send_grpc(grpc_address, payload, connections, seconds)


def send_http(url: str, payload: Payload, connections: int, seconds: float) -> Result:
    """Send the payload over HTTP/1.1, with wrk. Raises SystemExit if wrk is not installed or fails."""
    if not shutil.which("wrk"):
        raise SystemExit("bench: wrk is not installed: `apt-get install wrk`")
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder) / "body", Path(folder) / "script.lua"
        body.write_bytes(payload.body)
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in payload.headers.items())
        script.write_text(WRK_SCRIPT.format(path=payload.path, headers=headers, body=body))
        load = ["-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", f"{TIMEOUT_SECONDS}s"]
        done = subprocess.run(["wrk", *load, "-s", str(script), url], capture_output=True, text=True, check=True)
    match = re.search(r"RESULT (\d+) (\d+) (\d+) ([\d.]+) ([\d.]+)", done.stdout)
    if not match:
        raise SystemExit(f"bench: wrk printed no result: {done.stdout} {done.stderr}")
    requests, microseconds, failed, p50, p99 = map(float, match.groups())
    return Result(requests / microseconds * 1e6, p50 / 1e3, p99 / 1e3, int(requests), int(failed))


def send_grpc(address: str, payload: Payload, connections: int, seconds: float) -> Result:
    """Send the payload with grpcio, in a process of its own.

    That process is `python -m bench.load ADDRESS CONNECTIONS SECONDS < message`.
    """
    command = [sys.executable, "-m", "bench.load", address, str(connections), str(seconds)]
    done = subprocess.run(command, input=payload.body, capture_output=True, check=True)
    return Result(**json.loads(done.stdout))


async def _call_repeatedly(address: str, message: bytes, connections: int, seconds: float) -> Result:
    times: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds

    async def call_until_end(channel: grpc.aio.Channel) -> None:
        nonlocal failed
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        while (started_at := time.perf_counter()) < end:
            try:
                await method(message, timeout=TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError:
                failed += 1
            times.append(time.perf_counter() - started_at)

    # Without a pool of subchannels of their own all channels would share one connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(connections)]
    started_at = time.perf_counter()
    await asyncio.gather(*map(call_until_end, channels))
    elapsed_seconds = time.perf_counter() - started_at
    for channel in channels:
        await channel.close()
    times.sort()
    p50_ms, p99_ms = (times[int(len(times) * share)] * 1e3 for share in (0.5, 0.99))
    return Result(len(times) / elapsed_seconds, p50_ms, p99_ms, len(times), failed)


def main() -> None:
    """Send the message on standard input, and print the result as JSON."""
    address, connections, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    result = asyncio.run(_call_repeatedly(address, sys.stdin.buffer.read(), connections, seconds))
    sys.stdout.write(json.dumps(result.__dict__) + "\n")


if __name__ == "__main__":
    main()
