"""Ten thousand hostile requests among good ones: every good one gets its correct answer, and nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import re
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.exceptions
import httpx
import numpy as np
import pytest

from bench.server_process import memory_mib
from tests.support.callers import Caller, Grpc, Http2, KeepAlive
from tests.support.clients import INFER, PREDICT, make_v1_request
from tests.support.hostile import COMPRESSED_BOMB, HOSTILE_MESSAGES, HOSTILE_REQUESTS
from tests.support.metrics import requests_by_outcome, wait_for_metric
from tests.support.pictures import CAT
from tests.support.servers import Server, run_server
from tests.support.waiting import wait_for

ATTACKS = int(os.environ.get("TEST_CHAOS_REQUESTS") or 10_000)
WARM_UP_ATTACKS = ATTACKS // 4
ATTACKERS = 24
MAX_GROWTH = 1.1
LARGE_BYTES, LARGE_SHARE = 500_000, 0.1  # most bodies of that size are skipped: the client spends its time on them
BODY = make_v1_request(CAT).encode()
HEAD = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
COUNT_TASKS = """
import asyncio, runpy, signal, sys
def print_tasks(*_):
    print("tasks:", len(asyncio.all_tasks(asyncio.get_running_loop())), file=sys.stderr, flush=True)
signal.signal(signal.SIGUSR1, print_tasks)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Attackers:
    """Clients that attack both ports. `statuses` counts the answers that were read, by HTTP or gRPC status."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.statuses: Counter[str] = Counter()
        self._random = random.Random(0)
        self._http = httpx.AsyncClient(base_url=server.url, timeout=60)
        self._channels = [
            grpc.aio.insecure_channel(
                f"127.0.0.1:{port}", [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
            )
            for port in (server.grpc_port, server.http_port)
        ]
        self._attacks: list[Callable[[], Awaitable[None]]] = [
            self._send_bad_request,
            self._send_bad_request,
            self._send_bad_message,
            self._leave_early,
            self._send_half_a_request,
            self._send_slow_body,
            self._declare_too_large_body,
            self._pipeline_garbage,
            self._send_garbage,
            self._flood_with_frames,
            self._reset_streams,
            self._cancel_call,
        ]

    async def run(self, requests: int) -> None:
        attacks = itertools.islice(itertools.cycle(self._attacks), requests)

        async def attack() -> None:
            for send in attacks:
                async with asyncio.timeout(60):
                    await send()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(ATTACKERS):
                tasks.create_task(attack())

    async def close(self) -> None:
        await self._http.aclose()
        for channel in self._channels:
            await channel.close()
        gc.collect()  # errors refer to their calls, which refer to their connections

    def _choose(self, choices: list[Any]) -> Any:
        return self._random.choice(choices)

    async def _send_bad_request(self) -> None:
        hostile = self._choose(list(HOSTILE_REQUESTS.values()))
        if len(hostile.body) > LARGE_BYTES and self._random.random() > LARGE_SHARE:
            hostile = HOSTILE_REQUESTS["a key twice"]
        response = await self._http.post(hostile.path, content=hostile.body, headers=hostile.headers)
        self.statuses[str(response.status_code)] += 1
        assert response.status_code == hostile.status, response.text

    async def _send_bad_message(self) -> None:
        name = self._choose([name for name, message in HOSTILE_MESSAGES.items() if len(message) < LARGE_BYTES])
        call: Any = self._choose(self._channels).unary_unary(INFER)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(HOSTILE_MESSAGES[name], timeout=60)
        self.statuses[error.value.code().name] += 1
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, error.value

    async def _cancel_call(self) -> None:
        call = self._choose(self._channels).unary_unary(INFER)(b"\x0a\x0ccustom-model", timeout=60)
        ended = asyncio.create_task(_await_code(call))
        await asyncio.wait({ended}, timeout=self._random.random() / 100)
        call.cancel()
        await ended

    async def _leave_early(self) -> None:
        await self._send(
            self._server.http_port, HEAD % (PREDICT.encode(), len(BODY)) + BODY, self._random.random() / 20
        )

    async def _send_half_a_request(self) -> None:
        whole = HEAD % (PREDICT.encode(), len(BODY)) + BODY
        await self._send(self._server.http_port, whole[: self._random.randrange(len(whole))])

    async def _send_slow_body(self) -> None:
        """Send a body byte by byte, for up to 1.5 s: longer than the server's read_timeout_seconds."""
        _, writer = await self._send(self._server.http_port, HEAD % (PREDICT.encode(), 1000), close=False)
        for _ in range(self._random.randrange(15)):
            with suppress(OSError):
                writer.write(b" ")
                await writer.drain()
            await asyncio.sleep(0.1)
        writer.close()

    async def _declare_too_large_body(self) -> None:
        await self._send(self._server.http_port, HEAD % (PREDICT.encode(), 10**9) + bytes(100_000), 0.01)

    async def _pipeline_garbage(self) -> None:
        good = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        await self._send(self._server.http_port, good * 20 + self._random.randbytes(2000), 0.01)

    async def _send_garbage(self) -> None:
        start = self._choose(
            [b"", b"GET ", PREFACE, TLS_HELLO, b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"]
        )
        port = self._choose([self._server.http_port, self._server.grpc_port])
        await self._send(port, start + self._random.randbytes(self._random.randrange(3000)), 0.01)

    async def _flood_with_frames(self) -> None:
        frames = struct.pack(">BHBBI", 0, 0, 4, 0, 0) + struct.pack(">BHBBIQ", 0, 8, 6, 0, 0, 0)  # SETTINGS, PING
        port = self._choose([self._server.http_port, self._server.grpc_port])
        await self._send(port, PREFACE + frames * self._random.randrange(2000), 0.05)

    async def _reset_streams(self) -> None:
        """Open streams and reset each at once, and end with a compressed bomb."""
        port = self._choose([self._server.http_port, self._server.grpc_port])
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        connection.initiate_connection()
        pseudo = [(":method", "POST"), (":path", INFER), (":scheme", "http"), (":authority", "x")]
        headers = [*pseudo, ("content-type", "application/grpc"), ("te", "trailers"), ("grpc-encoding", "gzip")]
        for stream in range(1, 101, 2):
            connection.send_headers(stream, headers)
            connection.reset_stream(stream)
        connection.send_headers(101, headers)
        bomb = struct.pack(">BI", 1, len(COMPRESSED_BOMB)) + COMPRESSED_BOMB
        for start in range(0, len(bomb), 16384):
            connection.send_data(101, bomb[start : start + 16384])
        await self._send(port, connection.data_to_send(), 0.05)

    async def _send(
        self, port: int, data: bytes, stays_seconds: float = 0.0, close: bool = True
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send `data` over a new connection, and close it before the answer has ended; half of the time by a reset."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(OSError):
            writer.write(data)
            await writer.drain()
            if stays_seconds:
                with suppress(TimeoutError):
                    async with asyncio.timeout(stays_seconds):
                        self._record_status(await reader.read(65536))
        if close:
            if self._random.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
        return reader, writer

    def _record_status(self, answer: bytes) -> None:
        if found := re.match(rb"HTTP/1.1 (\d+) ", answer):
            self.statuses[found[1].decode()] += 1


async def _await_code(call: Any) -> grpc.StatusCode:
    code: grpc.StatusCode = await call.code()
    return code


class GoodClients:
    """Callers over every protocol. Each of their calls must get the correct answer."""

    def __init__(self, callers: list[Caller], expected: list[float]) -> None:
        self._callers = callers
        self._expected = expected
        self.answers = 0
        self.may_send = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for caller in self._callers:
                tasks.create_task(self._keep_sending(caller))

    async def _keep_sending(self, caller: Caller) -> None:
        while self.may_send:
            np.testing.assert_allclose(await caller.predict(), self._expected, rtol=1e-6)
            self.answers += 1
        await caller.close()


def count_tasks(server: Server) -> int:
    """Return the number of asyncio tasks of the server."""
    server.process.send_signal(signal.SIGUSR1)
    return int(server.wait_for_line(re.compile(r"^tasks: (\d+)"))[1])


@pytest.mark.slow
async def test_good_requests_among_thousands_of_hostile_ones_get_correct_answers_and_nothing_leaks(
    model_dir: Path, google: ModuleType
) -> None:
    flags = (f"--model_dir={model_dir}", "--read_timeout_seconds=1", "--max_connections=200")
    with run_server(*flags, python_flags=("-c", COUNT_TASKS)) as server:
        expected = server.predict(BODY).json()["predictions"][0]
        idle_tasks, idle_descriptors = count_tasks(server), server.count_descriptors()
        callers = [KeepAlive(server, BODY), Http2(server, BODY), Grpc(server.grpc_port, google, CAT)]
        good = GoodClients([*callers, Grpc(server.http_port, google, CAT)], expected)
        attackers = Attackers(server)
        sending = asyncio.create_task(good.run())
        await attackers.run(WARM_UP_ATTACKS)  # fills allocators and caches
        before_mib = memory_mib(server.process.pid, "Rss")
        await attackers.run(ATTACKS)
        good.may_send = False
        await sending
        await attackers.close()

        wait_for_metric(server, "pinnace_requests_in_flight", 0)
        await asyncio.to_thread(server.wait_for_descriptors, idle_descriptors)
        wait_for(lambda: count_tasks(server) <= idle_tasks, f"{idle_tasks} tasks")
        after_mib = memory_mib(server.process.pid, "Rss")
        outcomes = Counter({outcome: 0 for outcome in ("failed", "rejected")})
        for (_, outcome), count in requests_by_outcome(server).items():
            outcomes[outcome] += int(count)
        assert server.predict(BODY).json()["predictions"] == [expected]
        assert server.stop() == 0

    sys.stdout.write(
        f"\n{good.answers} good answers among {ATTACKS} hostile acts, answered {dict(attackers.statuses)}; outcomes "
        f"{dict(outcomes)}; RSS {before_mib:.0f} MiB, {after_mib:.0f} after them\n"
    )
    assert good.answers > 0
    assert outcomes["failed"] == 0
    assert not [status for status in attackers.statuses if status.startswith("5")]
    assert not [line for line in server.log if re.search(" ERROR |Traceback|never retrieved", line)]
    assert after_mib < before_mib * MAX_GROWTH
    for port in (server.http_port, server.grpc_port):
        with socket.create_server(("127.0.0.1", port)):
            pass
