"""pinnace/http_server.py: what becomes of connections."""

from __future__ import annotations

import re
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import httpx
import pytest

from tests.conftest import grpc_call
from tests.servers import Server, gated, read_until, running, start_failing
from tests.test_lifecycle import wait_until_refused

PREDICT = "/v1/models/custom-model:predict"
GATED_REQUEST = (
    b'POST /v1/models/custom-model:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 26\r\n\r\n{"instances": ["%s"]}'
)


def test_a_connection_that_its_client_closed_is_closed(server: Server) -> None:
    server.get("/")
    before = server.descriptors()

    for _ in range(50):
        server.get("/")

    server.wait_for_descriptors(before)


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_left_while_its_request_is_answered_is_closed(
    reset: bool, tmp_path: Path, gate: Callable[[str], Path]
) -> None:
    with gated(tmp_path) as server:
        server.get("/")
        before = server.descriptors()

        for number in range(20):
            held = gate(f"gate {number:02}")
            with server.connect() as connection:
                connection.sendall(GATED_REQUEST % held.name.encode())
                with held.open("wb"):  # opens when the request is being answered
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))
                    connection.close()

        server.wait_for_descriptors(before)


def test_an_http_2_connection_left_while_its_request_is_answered_is_closed(
    tmp_path: Path, gate: Callable[[str], Path]
) -> None:
    with gated(tmp_path) as server:
        server.get("/")
        before = server.descriptors()

        for number in range(10):
            held = gate(f"gate {number:02}")
            body = f'{{"instances": ["{held.name}"]}}'
            url = f"{server.url}/v1/models/custom-model:predict"
            with subprocess.Popen(["curl", "-sS", "--http2-prior-knowledge", "-d", body, url]) as curl, held.open("wb"):
                curl.kill()

        server.wait_for_descriptors(before)


def test_an_idle_connection_stays_open_for_the_next_request_and_is_closed_in_the_end() -> None:
    with (
        running("--predictor=tests.predictors:Echo", "--timeout_keep_alive=1") as server,
        server.connect() as connection,
    ):
        for _ in range(3):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_until(connection, b'{"status":"alive"}').startswith(b"HTTP/1.1 200 ")

        assert connection.recv(65536) == b""  # after a second, by the server


@pytest.mark.parametrize("milliseconds", [0.05, 0.1, 0.3])
def test_what_comes_over_idle_connections_while_it_stops_is_answered_or_not_taken(
    milliseconds: float, tmp_path: Path
) -> None:
    """One request each, so long after the other: those that the log has are those that got an answer."""
    request, answer = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", b'{"models":["custom-model"]}'
    with (
        (tmp_path / "access").open("w") as stdout,
        running("--predictor=tests.predictors:Echo", stdout=stdout) as server,
        ExitStack() as opened,
    ):
        connections = [opened.enter_context(server.connect()) for _ in range(400)]
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
        answered = sum(received(connection).endswith(answer) for connection in connections)
        assert server.wait() == 0

    assert (tmp_path / "access").read_text().count('"GET /v1/models ') == len(connections) + answered
    assert answered >= 100


def received(connection: socket.socket) -> bytes:
    """All until it is closed, politely or not."""
    data = b""
    with suppress(OSError):
        while chunk := connection.recv(65536):
            data += chunk
    return data


def test_without_a_host_every_interface_is_listened_on() -> None:
    with running("--predictor=tests.predictors:Echo", "--host=") as server:
        assert httpx.get(f"http://127.0.0.1:{server.http_port}/").status_code == 200
        if socket.has_ipv6:
            assert httpx.get(f"http://[::1]:{server.http_port}/").status_code == 200


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours_stops_the_start(host: str) -> None:
    code, lines = start_failing("--predictor=tests.predictors:Echo", f"--host={host}", "--http_port=0")

    assert (code, len(lines)) == (3, 1)
    assert lines[0].startswith("pinnace: HTTP cannot listen on port 0 of ")


def test_of_too_many_connections_the_one_that_is_idle_longest_is_closed_for_the_newcomer() -> None:
    with (
        running("--predictor=tests.predictors:Echo", "--max_connections=2") as server,
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


def test_where_every_connection_has_a_request_one_more_is_refused(tmp_path: Path, gate: Callable[[str], Path]) -> None:
    held = gate("held")
    with gated(tmp_path, "--max_connections=1") as server:
        with server.connect() as busy:
            busy.sendall(GATED_REQUEST.replace(b"26", b"23") % b"held")
            with held.open("wb"), server.connect() as refused:
                assert refused.recv(65536).startswith(b"HTTP/1.1 503 ")
                assert refused.recv(65536) == b""
            assert read_until(busy, b'["held"]}').startswith(b"HTTP/1.1 200 ")
        assert server.get("/").status_code == 200


def test_the_grpc_port_takes_no_more_connections_than_allowed(google: ModuleType) -> None:
    alone = [("grpc.use_local_subchannel_pool", 1)]
    with (
        running("--predictor=tests.predictors:Echo", "--max_connections=1") as server,
        grpc.insecure_channel(server.grpc_address, alone) as first,
        grpc.insecure_channel(server.grpc_address, alone) as second,
    ):
        assert grpc_call(first, google, "ServerLive", google.ServerLiveRequest()).live
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            grpc_call(second, google, "ServerLive", google.ServerLiveRequest())
        assert grpc_call(first, google, "ServerLive", google.ServerLiveRequest()).live


def test_a_shells_limit_of_descriptors_is_no_limit_of_connections() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running("--predictor=tests.predictors:Echo") as server:
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()

    assert re.search(rf"^Max open files +{most} +{most} ", limits, re.MULTILINE)


def http2_connection() -> h2.connection.H2Connection:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    return connection


def send_request(connection: h2.connection.H2Connection, stream: int, body: bytes, path: str = PREDICT) -> None:
    connection.send_headers(stream, [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "x")])
    connection.send_data(stream, body, end_stream=True)


def test_a_stopping_server_refuses_new_streams_and_answers_the_others_of_their_connection(
    tmp_path: Path, gate: Callable[[str], Path]
) -> None:
    held, connection = gate("held"), http2_connection()
    seen: list[h2.events.Event] = []
    with gated(tmp_path) as server, server.connect() as socket:
        send_request(connection, 1, b'{"instances": ["held"]}')
        socket.sendall(connection.data_to_send())
        with held.open("wb"):
            server.process.send_signal(signal.SIGTERM)
            wait_until_refused(server.http_port)
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


def test_a_connection_that_fails_fails_alone_and_is_a_line_in_the_log(server: Server) -> None:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    connection.initiate_connection()
    pseudo = [(b":method", b"GET"), (b":path", b"/\xff"), (b":scheme", b"http"), (b":authority", b"x")]
    connection.send_headers(1, pseudo, end_stream=True)
    with server.connect() as socket, server.connect() as other:
        socket.sendall(connection.data_to_send())
        server.wait_for_line(re.compile(r"a connection ended by UnicodeDecodeError: "))
        other.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_until(other, b'{"status":"alive"}')
