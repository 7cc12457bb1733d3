"""pinnace/http/server.py: the life of connections."""

from __future__ import annotations

import asyncio
import re
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import cast

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import httpx
import pytest
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper

from pinnace.http.connections import ConnectionRegistry
from pinnace.http.hypercorn_patches import HttpConfig, PatchedTCPServer
from tests.support.clients import call_grpc
from tests.support.servers import (
    Server,
    expect_start_failure,
    read_until,
    refuses_connections,
    run_gated_server,
    run_server,
)
from tests.support.waiting import wait_for

PREDICT = "/v1/models/custom-model:predict"
GATED_REQUEST = (
    b'POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 26\r\n\r\n{"instances": ["%s"]}'
)


def test_the_server_closes_a_connection_that_its_client_has_closed(server: Server) -> None:
    server.get("/")
    before = server.count_descriptors()

    for _ in range(50):
        server.get("/")

    server.wait_for_descriptors(before)


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_its_client_closes_during_a_request_is_closed(
    reset: bool, tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    with run_gated_server(tmp_path) as server:
        server.get("/")
        before = server.count_descriptors()

        for number in range(20):
            held = make_gate(f"gate {number:02}")
            with server.connect() as connection:
                connection.sendall(GATED_REQUEST % held.name.encode())
                with held.open("wb"):  # blocks until the request has reached the gate
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))
                    connection.close()

        server.wait_for_descriptors(before)


def test_an_http_2_connection_that_its_client_closes_during_a_request_is_closed(
    tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    with run_gated_server(tmp_path) as server:
        server.get("/")
        before = server.count_descriptors()

        for number in range(10):
            held = make_gate(f"gate {number:02}")
            body = f'{{"instances": ["{held.name}"]}}'
            url = f"{server.url}/v1/models/custom-model:predict"
            with subprocess.Popen(["curl", "-sS", "--http2-prior-knowledge", "-d", body, url]) as curl, held.open("wb"):
                curl.kill()

        server.wait_for_descriptors(before)


def test_an_idle_connection_is_kept_open_until_timeout_keep_alive() -> None:
    with (
        run_server("--predictor=tests.support.predictors:Echo", "--timeout_keep_alive=1") as server,
        server.connect() as connection,
    ):
        for _ in range(3):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_until(connection, b'{"status":"alive"}').startswith(b"HTTP/1.1 200 ")

        assert connection.recv(65536) == b""  # the server closes it after a second


@pytest.mark.parametrize("milliseconds", [0.05, 0.1, 0.3])
def test_a_request_on_an_idle_connection_during_a_stop_is_answered_or_not_accepted(
    milliseconds: float, tmp_path: Path
) -> None:
    """Send one request per connection at this interval. The logged requests are exactly the answered ones."""
    request, answer = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", b'{"models":["custom-model"]}'
    with (
        (tmp_path / "access").open("w") as stdout,
        run_server("--predictor=tests.support.predictors:Echo", stdout=stdout) as server,
        ExitStack() as stack,
    ):
        connections = [stack.enter_context(server.connect()) for _ in range(400)]
        for connection in connections:
            connection.sendall(request)
            read_until(connection, answer)
        due = time.perf_counter()
        for number, connection in enumerate(connections):
            while time.perf_counter() < due:
                pass
            if number == 100:
                server.process.send_signal(signal.SIGTERM)
            with suppress(OSError):
                connection.sendall(request)
            due += milliseconds / 1000
        answered = sum(receive_all(connection).endswith(answer) for connection in connections)
        assert server.wait() == 0

    assert (tmp_path / "access").read_text().count('"GET /v1/models ') == len(connections) + answered
    assert answered >= 100


def receive_all(connection: socket.socket) -> bytes:
    """Return everything until the connection is closed or reset."""
    data = b""
    with suppress(OSError):
        while chunk := connection.recv(65536):
            data += chunk
    return data


def test_without_a_host_the_server_listens_on_every_interface() -> None:
    with run_server("--predictor=tests.support.predictors:Echo", "--host=") as server:
        assert httpx.get(f"http://127.0.0.1:{server.http_port}/").status_code == 200
        if socket.has_ipv6:
            assert httpx.get(f"http://[::1]:{server.http_port}/").status_code == 200


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_stops_the_start(host: str) -> None:
    code, lines = expect_start_failure("--predictor=tests.support.predictors:Echo", f"--host={host}", "--http_port=0")

    assert (code, len(lines)) == (3, 1)
    assert lines[0].startswith("pinnace: HTTP cannot listen on port 0 of ")


def test_at_max_connections_a_new_connection_evicts_the_one_that_is_idle_longest() -> None:
    with (
        run_server("--predictor=tests.support.predictors:Echo", "--max_connections=2") as server,
        server.connect() as oldest,
        server.connect() as used,
    ):
        for connection in (oldest, used, oldest):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            read_until(connection, b'{"status":"alive"}')

        assert server.get("/v2/health/ready").json() == {"ready": True}
        assert used.recv(65536) == b""
        oldest.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_until(oldest, b'{"status":"alive"}')


def test_a_connection_is_refused_when_max_connections_have_requests_in_flight(
    tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    held = make_gate("held")
    with run_gated_server(tmp_path, "--max_connections=1") as server:
        with server.connect() as busy:
            busy.sendall(GATED_REQUEST.replace(b"26", b"23") % b"held")
            with held.open("wb"), server.connect() as refused:
                assert refused.recv(65536).startswith(b"HTTP/1.1 503 ")
                assert refused.recv(65536) == b""
            assert read_until(busy, b'["held"]}').startswith(b"HTTP/1.1 200 ")
        assert server.get("/").status_code == 200


def test_the_grpc_port_accepts_at_most_max_connections(google: ModuleType) -> None:
    alone = [("grpc.use_local_subchannel_pool", 1)]
    with (
        run_server("--predictor=tests.support.predictors:Echo", "--max_connections=1") as server,
        grpc.insecure_channel(server.grpc_address, alone) as first,
        grpc.insecure_channel(server.grpc_address, alone) as second,
    ):
        assert call_grpc(first, google, "ServerLive", google.ServerLiveRequest()).live
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            call_grpc(second, google, "ServerLive", google.ServerLiveRequest())
        assert call_grpc(first, google, "ServerLive", google.ServerLiveRequest()).live


def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_limit() -> None:
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with run_server("--predictor=tests.support.predictors:Echo") as server:
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()

    assert re.search(rf"^Max open files +{hard_limit} +{hard_limit} ", limits, re.MULTILINE)


def open_http2_connection() -> h2.connection.H2Connection:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    return connection


def send_request(connection: h2.connection.H2Connection, stream: int, body: bytes, path: str = PREDICT) -> None:
    connection.send_headers(stream, [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "x")])
    connection.send_data(stream, body, end_stream=True)


def test_a_stopping_server_refuses_new_streams_and_answers_those_in_flight_on_the_connection(
    tmp_path: Path, make_gate: Callable[[str], Path]
) -> None:
    held, connection = make_gate("held"), open_http2_connection()
    seen: list[h2.events.Event] = []
    with run_gated_server(tmp_path) as server, server.connect() as socket:
        send_request(connection, 1, b'{"instances": ["held"]}')
        socket.sendall(connection.data_to_send())
        with held.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            wait_for(partial(refuses_connections, server.http_port), "a closed HTTP port")
            send_request(connection, 3, b'{"instances": ["another"]}')
            socket.sendall(connection.data_to_send())
            while not any(isinstance(event, h2.events.StreamReset) for event in seen):
                seen += connection.receive_data(socket.recv(65536))
        while not any(isinstance(event, h2.events.StreamEnded) for event in seen):
            seen += connection.receive_data(socket.recv(65536))
        assert server.wait() == 0

    (reset,) = (event for event in seen if isinstance(event, h2.events.StreamReset))
    (response,) = (event for event in seen if isinstance(event, h2.events.ResponseReceived))
    assert (reset.stream_id, reset.error_code) == (3, h2.errors.ErrorCodes.REFUSED_STREAM)
    assert (response.stream_id, next(str(value) for _, value in response.headers)) == (1, "200")


async def test_a_failing_connection_is_logged_and_closed(caplog: pytest.LogCaptureFixture) -> None:
    config = HttpConfig()
    config.connections = ConnectionRegistry(1, send_timeout_seconds=30)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader.set_exception(ValueError("broken\nreader"))
        loop = asyncio.get_running_loop()
        await PatchedTCPServer(cast(AppWrapper, None), loop, config, WorkerContext(None), {}, reader, writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        assert await reader.read() == b""
        writer.close()

    assert caplog.messages == ["HTTP connection closed after ValueError: broken reader"]
