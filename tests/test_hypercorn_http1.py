"""pinnace/http/hypercorn_http1.py: HTTP/1.1 requests that Hypercorn mishandles."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.clients import PREDICT
from tests.support.servers import Server, read_until, run_server

ECHO = "--predictor=tests.support.predictors:Echo"
GET = b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n"
CONNECT = b"%s other:443 HTTP/1.1\r\nHost: other:443\r\n\r\n"
SMUGGLED = GET % (b"/v2", b"")
BROKEN_WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
WEBSOCKET = BROKEN_WEBSOCKET + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


def receive_all(connection: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def test_a_request_with_both_content_length_and_transfer_encoding_is_the_last_of_its_connection(server: Server) -> None:
    body = b'{"instances":[]}'
    request = (
        f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    )
    with server.connect() as connection:
        connection.sendall(request + SMUGGLED)
        received = receive_all(connection)

    assert received.count(b"HTTP/1.1 ") == 1
    assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"\r\nconnection: close\r\n" in received


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        (b"http://other", b'{"status":"alive"}'),
        (b"HTTP://other:8080/", b'{"status":"alive"}'),
        (b"https://other?a=b", b'{"status":"alive"}'),
        (b"http://other/v2/health/live", b'{"live":true}'),
    ],
)
def test_the_target_may_be_an_absolute_url(target: bytes, answer: bytes, server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(GET % (target, b""))
        assert read_until(connection, answer).startswith(b"HTTP/1.1 200 OK\r\n")


def test_the_query_of_an_absolute_url_is_logged(tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w") as log,
        run_server("--predictor=tests.support.predictors:Echo", stdout=log) as server,
    ):
        with server.connect() as connection:
            connection.sendall(GET % (b"http://other/v2?a=b", b""))
            read_until(connection, b"}")
        assert server.stop() == 0

    assert '"GET /v2?a=b HTTP/1.1" 200' in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("path", "status_line"),
    [(b"/", b"HTTP/1.1 200 OK\r\n"), (b"/no/such/path", b"HTTP/1.1 404 Not Found\r\n")],
)
def test_the_status_line_has_its_reason_phrase(path: bytes, status_line: bytes, server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(GET % (path, b"Connection: close\r\n"))
        assert receive_all(connection).startswith(status_line)


def test_a_request_that_expects_it_is_told_to_continue(server: Server) -> None:
    with server.connect() as connection:
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100 Continue\r\n")


@pytest.mark.parametrize("handshake", [WEBSOCKET, BROKEN_WEBSOCKET])
def test_the_connection_of_a_websocket_handshake_is_closed_after_the_answer(handshake: bytes, server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(GET % (b"/v2/health/live", handshake))
        received = receive_all(connection)

    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert received.endswith(b'{"live":true}')


@pytest.mark.parametrize("upgrade", [H2C, b"Connection: Upgrade\r\nUpgrade: other/1\r\n"])
def test_an_upgrade_is_ignored_and_the_connection_goes_on(upgrade: bytes, server: Server) -> None:
    with server.connect() as connection:
        for _ in range(2):
            connection.sendall(GET % (b"/v2/health/live", upgrade))
            assert read_until(connection, b'{"live":true}').startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("method", [b"CONNECT", b"connect"])
def test_connect_is_not_allowed_and_closes_the_connection(method: bytes, server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(CONNECT % method + SMUGGLED)
        received = receive_all(connection)

    assert received.count(b"HTTP/1.1 ") == 1
    assert received.startswith(b"HTTP/1.1 405 Method Not Allowed\r\nallow: GET, HEAD, POST\r\n")


def test_refused_requests_do_not_delay_a_stop() -> None:
    requests = [*(GET % (b"/", upgrade) for upgrade in (WEBSOCKET, BROKEN_WEBSOCKET, H2C)), CONNECT % b"CONNECT"]
    with run_server(ECHO, "--grace_period_seconds=600") as server, ExitStack() as stack:
        for request in requests:
            connection = stack.enter_context(server.connect())
            connection.sendall(request)
            assert connection.recv(65536)
        assert server.stop() == 0
